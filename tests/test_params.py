"params.yaml: whatever is wrong with it is named, with the key, before anything runs."
import copy
import pytest
from hypothesis import given, settings, strategies as st
from conftest import ROOT, load
from synthscale.run import main
from synthscale.study import Params, StudyError, _fields_at, derive_seed, parse_params, read_yaml

GOOD = load(ROOT/'params.yaml')

def sections(d, path=()):
    "Paths of the dicts in params.yaml whose keys are fixed (not names that the user gives)."
    if path not in [('models',), ('judges',), ('prompts', 'words'), ('prompts', 'words', 'description'), ('prompts', 'sets'), ('generate', 'sources'), ('filters',), ('laws', 'choices'), ('data', 'sets'), ('quality', 'sources'), ('classify', 'curves'), ('laws', 'fit_range'), ('laws', 'x'),
                    ('report', 'labels'), ('recipes',), ('unions',)] and path[-1:] not in [('splits',), ('fill',), ('kwargs',), ('transform',)]: yield path
    for k, v in d.items():
        if isinstance(v, dict): yield from sections(v, (*path, k))

def at(d, path):
    for k in path: d = d[k]
    return d

def message(change):
    d = copy.deepcopy(GOOD)
    change(d)
    with pytest.raises(StudyError) as e: parse_params(d)
    return str(e.value)

def test_the_embedded_study_is_valid(): assert parse_params(GOOD).study.name == 'digits'

@given(st.sampled_from(list(sections(GOOD))), st.text('abcdefghijklmnop_', min_size=3, max_size=12))
@settings(max_examples=150, deadline=None)
def test_an_unknown_key_anywhere_is_named(path, key):
    if key in at(GOOD, path) or key in _fields_at(path, at(GOOD, path).get('kind')): return
    m = message(lambda d: at(d, path).update({key: 1}))
    assert f"unknown key '{'.'.join((*path, key))}'" in m

@given(st.sampled_from(list(sections(GOOD))), st.data())
@settings(max_examples=100, deadline=None)
def test_a_wrong_type_anywhere_is_named(path, data):
    key = data.draw(st.sampled_from(sorted(at(GOOD, path))))
    m = message(lambda d: at(d, path).update({key: {'no': {'such': 'thing'}} if not isinstance(at(GOOD, path)[key], dict) else 3}))
    assert key in m

@pytest.mark.parametrize('change, words', [
    (lambda d: d['classify']['curves']['typeset'].update(synthetic='typest'), "classify.curves.typeset.synthetic is 'typest': no such set under data.sets, generate.sources, filters or unions (did you mean 'typeset'?)"),
    (lambda d: d['quality']['sources']['real'].update(set='digit'), "quality.sources.real.set is 'digit'"),
    (lambda d: d['quality'].update(real_judge='judge_rael'), "did you mean 'judge_real'?"),
    (lambda d: d['laws']['fit_range'].update(reel=[1, 2]), "no such curve under classify.curves (did you mean 'real'?)"),
    (lambda d: d['laws']['fit_range'].update(real=[800, 10]), 'laws.fit_range.real is [800, 10]'),
    (lambda d: d['laws'].update(compare=[['real', 'real50_typeset']]), "'real50_typeset': no such curve under laws.fit_range"),
    (lambda d: d['report'].update(scaling=['real', 'typset']), "report.scaling is 'typset'"),
    (lambda d: d['study'].update(classes=['zero', 'one', 'zero']), "study.classes names 'zero' twice"),
    (lambda d: d['classify']['curves']['real'].update(n_real=[0]), 'a point without any image'),
    (lambda d: d['classify']['curves']['real'].update(n_real=[-10]), 'classify.curves.real.n_real.0'),
    (lambda d: d['recipes']['convnext_digits']['optimizer'].update(lr='1e-3'), 'recipes.convnext_digits.optimizer.lr'),
    (lambda d: d['data']['sets'].update({'a/b': d['data']['sets']['digits']}), 'a/b'),
    (lambda d: d['recipes']['convnext_digits']['optimizer'].pop('lr'), "key 'recipes.convnext_digits.optimizer.lr' is missing"),
    (lambda d: d['classify']['eval'].update(shift_tests=['test']), 'each with a name of its own'),
    (lambda d: d['classify']['eval'].update(within=['vale']), "classify.eval.within is 'vale': no such split under classify.eval (did you mean 'val'?)"),
    (lambda d: d['classify']['eval'].update(shift_set='digit'), "classify.eval.shift_set is 'digit'"),
    (lambda d: d['judges']['judge_real'].update(recipe='convnext'), "judges.judge_real.recipe is 'convnext': no such recipe under recipes"),
    (lambda d: d['prompts']['sets'].update(names={'templates': []}), 'prompts.sets.names is empty: expected either templates or by_class'),
    (lambda d: d['prompts']['sets'].update(names={'templates': ['{name}'], 'by_class': {'zero': ['0']}}), 'given twice, by templates and by_class'),
    (lambda d: d['prompts']['sets'].update(names={'by_class': {'zero': ['0'], 'one': []}}), "prompts.sets.names.by_class has no prompt for class 'one'"),
    (lambda d: d['prompts']['sets'].update(names={'by_class': {'zeroo': ['0']}}), "by_class speaks of 'zeroo', which is no class of the study (did you mean 'zero'?)"),
    (lambda d: d['prompts']['sets']['styles']['fill'].update(face=[]), 'prompts.sets.styles.fill.face is empty'),
    (lambda d: d['prompts']['sets']['styles']['fill'].pop('face'), 'nothing fills {face}'),
    (lambda d: d['prompts']['sets'].update(names={'templates': ['a digit']}), "'a digit' does not say the class"),
    (lambda d: d['prompts']['sets'].update(names={'templates': ['{name']}), "'{name' is not a template"),
    (lambda d: d['prompts']['words']['description'].pop('nine'), "prompts.sets.described has no prompt for class 'nine'"),
    (lambda d: d['prompts']['words']['description'].update(ten='x'), "prompts.words.description speaks of 'ten'"),
    (lambda d: d['generate']['sources']['names_g2'].update(guidance_scale=0.9), 'generate.sources.names_g2.guidance_scale is 0.9'),
    (lambda d: d['generate']['sources']['names_g2'].update(model='mini_ds'), "generate.sources.names_g2.model is 'mini_ds': no such model under models"),
    (lambda d: d['generate']['sources']['names_g2'].update(prompts='nmes'), "did you mean 'names'?"),
    (lambda d: d['generate']['sources'].update(typeset=d['generate']['sources']['names_g2']), "'typeset' stands under data.sets and under generate.sources"),
    (lambda d: d['models']['mini_sd'].update(kind='sdxl'), 'models.mini_sd.kind'),
    (lambda d: d['models']['mini_sd']['unet'].update(caption_dropout=0.0), 'models.mini_sd.unet.caption_dropout'),
    (lambda d: d['generate']['sources']['names_g2'].update(guidance_scale=float('nan')), 'generate.sources.names_g2.guidance_scale is nan'),
    (lambda d: d['generate']['sources']['names_g2'].update(n_images=9), 'expected at least one image for each of 10 classes'),
    (lambda d: d['prompts']['sets']['styles']['fill'].update(name=['x']), 'prompts.sets.styles.fill.name: {name} already stands for'),
    (lambda d: d['prompts']['sets'].update(names={'templates': ['{name:d}']}), 'without a format'),
    (lambda d: d['models']['mini_sd']['unet'].update(channels=[64, 100]), 'models.mini_sd.unet.channels.1 is 100'),
    (lambda d: d['models']['mini_sd']['text'].update(vocab_size=300), 'models.mini_sd.text.vocab_size is 300'),
    (lambda d: d['data'].update(image_size=6), 'data.image_size is 6, expected a multiple of 4'),
    (lambda d: d['laws']['choices']['prompt_set'].update(n_images=4001), "laws.choices.prompt_set.n_images is 4001: curve 'names_g2' has no such size"),
    (lambda d: d['classify']['curves'].update({'g7.5': d['classify']['curves']['real']}), 'g7.5'),
    (lambda d: d['laws']['choices']['prompt_set'].update(chosen='real'), 'laws.choices.prompt_set.chosen'),
    (lambda d: d['data']['sets'].update(hub=dict(kind='hub_images', input='build/nbs/01_data.ipynb', repo='a/b', revision='main')), "data.sets.hub.revision is 'main': expected a full commit hash"),
    (lambda d: d['data']['sets'].update(s=dict(kind='tiles', input='x', pattern='(?P<class>.)', tile=8, drop='t.csv')), 'drop and drop_column belong together'),
    (lambda d: d['unions'].update(u=dict(first='typeset', second='typeset')), "unions.u names 'typeset' twice"),
    (lambda d: d['unions'].update(u=dict(first='u', second='typeset')), "unions.u.first is 'u': no such set"),
    (lambda d: d['data']['sets']['digits'].update(kind='uci'), "data.sets.digits.kind is 'uci'"),
])
def test_what_cannot_be_is_named(change, words): assert words in message(change)

def test_files_that_are_not_params(tmp_path, capsys):
    assert main(['strip', '--study', str(tmp_path)]) == 1
    assert 'params.yaml: no such file' in capsys.readouterr().err
    (tmp_path/'params.yaml').write_text('a: [1')
    with pytest.raises(StudyError, match='not readable as YAML'): read_yaml(tmp_path/'params.yaml')
    (tmp_path/'params.yaml').write_text('- 1')
    with pytest.raises(StudyError, match='expected sections'): read_yaml(tmp_path/'params.yaml')

def test_yaml_is_read_as_dvc_reads_it(tmp_path):
    (tmp_path/'p.yaml').write_text('a: 1e-3\nb: no\n')
    assert read_yaml(tmp_path/'p.yaml') == {'a': 0.001, 'b': 'no'}

@given(st.lists(st.one_of(st.integers(0, 2**31), st.text(max_size=8)), min_size=1, max_size=4), st.lists(st.one_of(st.integers(0, 2**31), st.text(max_size=8)), min_size=1, max_size=4))
def test_seeds_follow_their_names(a, b):
    assert 0 <= derive_seed(*a) < 2**63
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)
