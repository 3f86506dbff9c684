"Names of somebody else's params.yaml never reach a shell, whichever command of DVC meets them first."
import re, subprocess, sys
import pytest
from conftest import ROOT, copy_repo, dump, environment, load, sh
from synthscale.doctor import check_names
from synthscale.run import main, stage_key
from synthscale.smoke import photo_params, smoke_params, smoke_text_models, with_adapted, with_pairs
from synthscale.study import Study, StudyError

HOSTILE = ['zz;touch PWN', "a'b;touch PWN;'", 'a";touch PWN;"', '$(touch PWN)', '`touch PWN`', 'a\ntouch PWN\n',
           'a&touch PWN&', 'a|touch PWN', 'x;touch PWN;/../y', 'a\u2028touch PWN', '-h', '--study', "'\ntouch PWN\n'"]
FOREACH = {k: v['foreach'].strip('${}') for k, v in load(ROOT/'dvc.yaml')['stages'].items() if 'foreach' in v}

@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    "The repository as DVC sees it, without inputs: no stage of it can do its work."
    d = copy_repo(tmp_path_factory.mktemp('bare')/'repo')
    sh('git init -q && git add -A && git commit -qm all', d)
    return d

def with_texts():
    "The parameters of the smoke study with a prompt set of every kind, a section about pairs, and a question."
    p, texts = smoke_params(), smoke_text_models()
    p['models'] |= texts.pop('models')
    p['prompts'] |= texts
    p['clip'] = with_pairs(smoke_params())['clip']
    p['quality']['clip'] = dict(rendered=dict(model='judge'))
    p['your_task'] = dict(decision=dict(photos='digits', candidates=['rendered'], recipes=['convnext_digits'],
                                        test_split='test', n_photos=[20]))
    p['retrieved'], p['adapted'] = photo_params()['retrieved'], with_adapted(smoke_params())['adapted']
    return p

def write(d, place, names):
    "params.yaml with hostile names in one place, each with the contents of an ordinary item."
    p = section = with_texts()
    for part in place.split('.'):
        section = section[part]
    item = next(iter(section.values()))
    section.clear()
    section.update({n: item for n in names})
    dump(p, d/'params.yaml')

def dvc(d, *args):
    "What a command of DVC says; nothing may have been executed by it."
    r = subprocess.run([sys.executable, '-m', 'dvc', *args], cwd=d, env=environment(), capture_output=True, text=True)
    assert not list(d.rglob('PWN*')), f'{args}: executed\n{r.stdout}{r.stderr}'
    return r.returncode, r.stdout+r.stderr

def test_no_command_has_a_name_in_it():
    for stage, spec in load(ROOT/'dvc.yaml')['stages'].items():
        assert '${' not in spec.get('do', spec)['cmd'], stage

@pytest.mark.slow
@pytest.mark.parametrize('group', FOREACH)
def test_single_stages_are_refused_by_name(bare, group):
    "-s skips prepare, -f every check of DVC's before the command, -k goes on after a failure: the shell gets them all."
    write(bare, FOREACH[group], HOSTILE)
    code, said = dvc(bare, 'repro', '-s', '-f', '-k', group)
    assert code and len(re.findall("^Running stage '", said, re.M)) == len(HOSTILE), said
    assert said.count('a name: letters, digits') == len(HOSTILE), said

@pytest.mark.slow
@pytest.mark.parametrize('group', FOREACH)
def test_whole_runs_and_experiments_stop_before(bare, group):
    write(bare, FOREACH[group], HOSTILE)
    assert dvc(bare, 'repro')[0]
    for name in HOSTILE[:2]:
        assert dvc(bare, 'repro', '-s', f'{group}@{name}')[0]
    write(bare, FOREACH[group], ['fine'])
    assert dvc(bare, 'exp', 'run', '-S', f'+{FOREACH[group]}.zz;touch PWN={{a: 1}}', '-s', group)[0]

@pytest.mark.parametrize('name', [*HOSTILE, '../nbs', '.', '..', '', 'a b', 'a.b', 'größe', 'a/b', 3, None])
@pytest.mark.parametrize('place', sorted(set(FOREACH.values())))
def test_repro_refuses_them_before_dvc_starts(place, name):
    raw = {}
    section = raw
    for part in place.split('.'):
        section = section.setdefault(part, {})
    section[name] = {}
    with pytest.raises(StudyError, match='a name: letters, digits'):
        check_names(Study('.', raw))

@pytest.mark.parametrize('name', ['-h', '--study', '-', 'a b', ''])
@pytest.mark.parametrize('place', sorted({*FOREACH.values(), 'recipes'}))
def test_params_yaml_refuses_them(place, name):
    p = section = with_texts()
    for part in place.split('.'):
        section = section[part]
    section[name] = next(iter(section.values()))
    with pytest.raises(StudyError, match=re.escape(repr(name))):
        getattr(Study('.', p), place.split('.')[0])

def test_a_name_is_handed_over_by_dvc_or_given(monkeypatch, capsys):
    monkeypatch.delenv('DVC_STAGE', raising=False)
    assert main(['data', '-p', 'name', '@']) == 1
    assert 'give the name itself' in capsys.readouterr().err
    for stage in ('data@a.b', 'data@', 'data', '../dvc.yaml:data@$(x)'):
        monkeypatch.setenv('DVC_STAGE', stage)
        with pytest.raises(StudyError):
            stage_key()
    monkeypatch.setenv('DVC_STAGE', '../../my studies/dvc.yaml:classify_sources@styles_g7-5')
    assert stage_key() == 'styles_g7-5'
