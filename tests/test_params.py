"params.yaml: whatever is wrong with it is named, with the key, before anything runs."
import copy
import pytest
from hypothesis import given, settings, strategies as st
from conftest import ROOT, load
from synthscale.run import main
from synthscale.study import Params, StudyError, derive_seed, parse_params, read_yaml

GOOD = load(ROOT/'params.yaml')

def sections(d, path=()):
    "Paths of the dicts in params.yaml whose keys are fixed (not names that the user gives)."
    if path not in [('models',), ('data', 'sets'), ('quality', 'sources'), ('classify', 'curves'), ('laws', 'fit_range'), ('laws', 'x'),
                    ('report', 'labels'), ('classify', 'arch', 'kwargs')] and path[-1:] != ('splits',): yield path
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
    if key in at(GOOD, path) or key in ('x', 'mixing', 'labels', 'samples', 'compare', 'metric', 'split', 'kwargs', 'shard_size', 'real_share'): return
    m = message(lambda d: at(d, path).update({key: 1}))
    assert f"unknown key '{'.'.join((*path, key))}'" in m

@given(st.sampled_from(list(sections(GOOD))), st.data())
@settings(max_examples=100, deadline=None)
def test_a_wrong_type_anywhere_is_named(path, data):
    key = data.draw(st.sampled_from(sorted(at(GOOD, path))))
    m = message(lambda d: at(d, path).update({key: {'no': {'such': 'thing'}} if not isinstance(at(GOOD, path)[key], dict) else 3}))
    assert key in m

@pytest.mark.parametrize('change, words', [
    (lambda d: d['classify']['curves']['typeset'].update(synthetic='typest'), "classify.curves.typeset.synthetic is 'typest': no such set under data.sets (did you mean 'typeset'?)"),
    (lambda d: d['quality']['sources']['real'].update(set='digit'), "quality.sources.real.set is 'digit'"),
    (lambda d: d['quality'].update(real_judge='judge_rael'), "did you mean 'judge_real'?"),
    (lambda d: d['laws']['fit_range'].update(reel=[1, 2]), "no such curve under classify.curves (did you mean 'real'?)"),
    (lambda d: d['laws']['fit_range'].update(real=[800, 10]), 'laws.fit_range.real is [800, 10]'),
    (lambda d: d['laws'].update(compare=[['real', 'real50_typeset']]), "'real50_typeset': no such curve under laws.fit_range"),
    (lambda d: d['report'].update(scaling=['real', 'typset']), "report.scaling is 'typset'"),
    (lambda d: d['study'].update(classes=['zero', 'one', 'zero']), "study.classes names 'zero' twice"),
    (lambda d: d['classify']['curves']['real'].update(n_real=[0]), 'a point without any image'),
    (lambda d: d['classify']['curves']['real'].update(n_real=[-10]), 'classify.curves.real.n_real.0'),
    (lambda d: d['classify']['recipe'].update(lr='1e-3'), 'classify.recipe.lr'),
    (lambda d: d['data']['sets'].update({'a/b': d['data']['sets']['digits']}), 'a/b'),
    (lambda d: d['classify']['recipe'].pop('lr'), "key 'classify.recipe.lr' is missing"),
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
