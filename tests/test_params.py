"params.yaml: whatever is wrong with it is named, with the key, before anything runs."
import copy, json
import pytest
from hypothesis import given, settings, strategies as st
from conftest import ROOT, load
from synthscale.params import RENAMED, check_study, problems, renamed_keys, resolved
from synthscale.run import main
from synthscale.study import SECTIONS, Study, StudyError, derive_seed, fields_at, read_yaml, section_class

GOOD = load(ROOT/'params.yaml')
NAMED = {     # sections whose keys the user chooses
    ('models',), ('evaluators',), ('prompts', 'words'), ('prompts', 'words', 'description'), ('prompts', 'sets'),
    ('generate', 'sources'), ('laws', 'model_selection'), ('data', 'sets'), ('quality', 'sets'), ('classify', 'curves'),
    ('classify', 'mixtures'), ('report', 'labels'), ('report', 'panels'), ('recipes',), ('study', 'seed_names'),
    ('prompts', 'written'), ('prompts', 'captions'), ('prompts', 'also_named'), ('report', 'supervision'),
    *(('clip', k) for k in ('pools', 'recipes', 'curves', 'mixtures', 'attributes', 'gaps'))}
FREE = ('splits', 'fill', 'kwargs', 'transform', 'config', 'text_cfg', 'values', 'x', 'fit_range',
        'rare', 'mislabelled')         # dicts whose keys others choose, e.g. classes in a set's damage

def study(data):
    return Study(ROOT, data)

def sections(d, path=()):
    "Paths of the dicts in params.yaml whose keys are fixed."
    if path not in NAMED and path[-1:] not in [(k,) for k in FREE]:
        yield path
    for k, v in d.items():
        if isinstance(v, dict):
            yield from sections(v, (*path, k))

def at(d, path):
    for k in path:
        d = d[k]
    return d

def known(path):
    "The field names that are valid at a path of params.yaml."
    if not path: return ['root', *SECTIONS]
    return fields_at(section_class(path[0]), path[1:], at(GOOD, path).get('type'))

def message(change):
    d = copy.deepcopy(GOOD)
    change(d)
    with pytest.raises(StudyError) as e:
        check_study(study(d))
    return str(e.value)

def test_the_embedded_study_is_valid():
    assert problems(study(GOOD)) == []
    for p in ROOT.glob('studies/*/params.yaml'):
        assert problems(Study(p.parent)) == []

def test_the_embedded_params_are_short_and_name_each_source_once():
    lines, prompts = (ROOT/'params.yaml').read_text().splitlines(), GOOD['prompts']
    named = [at(GOOD, path) for path in NAMED if path[0] != 'study' and path[1:2] not in [('words',), ('also_named',)]]
    assert len(lines) < 2.2*(sum(map(len, named))+len(GOOD['laws']['primary']))
    elsewhere = {*GOOD['data']['sets'], *GOOD['classify']['curves'], *GOOD['classify']['mixtures'],
                 *GOOD['quality']['sets']}
    of_prompts = {*prompts['sets'], *prompts['written'], *prompts['captions']}      # these have labels of their own
    elsewhere |= {*GOOD['report']['labels']}-of_prompts
    for source in GOOD['generate']['sources']:
        assert sum(line.strip().startswith(f'{source}: {{model: ') and 'guidance_scale' in line for line in lines) == 1
        assert source not in elsewhere

@given(st.sampled_from(list(sections(GOOD))), st.text('abcdefghijklmnop_', min_size=3, max_size=12))
@settings(max_examples=100, deadline=None)
def test_an_unknown_key_anywhere_is_named(path, key):
    if key in at(GOOD, path) or key in known(path): return
    m = message(lambda d: at(d, path).update({key: 1}))
    assert f"unknown key '{'.'.join((*path, key))}'" in m

@given(st.sampled_from([p for p in sections(GOOD) if at(GOOD, p)]), st.data())
@settings(max_examples=100, deadline=None)
def test_a_wrong_type_anywhere_is_named(path, data):
    key = data.draw(st.sampled_from(sorted(at(GOOD, path))))
    wrong = 3 if isinstance(at(GOOD, path)[key], dict) else {'no': {'such': 'thing'}}
    assert key in message(lambda d: at(d, path).update({key: wrong}))

def own_words(d):
    "Words and templates in params.yaml, and no class table; returns the prompt sets."
    p = d['prompts']
    del p['classes']
    p['words'] = {k: {c: f'{k} of {c}' for c in d['study']['classes']} for k in ('description', 'hypernyms')}
    p['sets'] |= dict(described={'templates': ['{name}, {description}']},
                      styles={'templates': ['a {name} in a {face} typeface'], 'fill': {'face': ['sans', 'serif']}})
    return p['sets']

def test_words_may_be_given_without_a_class_table():
    d = copy.deepcopy(GOOD)
    own_words(d)
    assert problems(study(d)) == []

CASES = [
    (lambda d: d['classify']['curves']['rendered'].update(set='renderd'),
     "classify.curves.rendered.set is 'renderd': no such set under data.sets, generate.sources, filters, merged or "
     "retrieved (did you mean 'rendered'?)"),
    (lambda d: d['quality']['sets'].update(digit={}), "quality.sets is 'digit': no such set under data.sets"),
    (lambda d: d['quality'].update(real_evaluator='real_clasifier'), "did you mean 'real_classifier'?"),
    (lambda d: d['quality'].update(clip=dict(drawn=dict(model='mini_sdd'))), "did you mean 'mini_sd'?"),
    (lambda d: d['quality'].update(clip=dict(drawn=dict(model='mini_sd'))), 'whose task is zero-shot-image'),
    (lambda d: d['quality'].update(clip=dict(drown=dict(model='mini_sd'))), "did you mean 'drawn'?"),
    (lambda d: d['laws'].update(fit_range={'mnits': [1, 2]}), "(did you mean 'mnist'?)"),
    (lambda d: d['laws'].update(fit_range={'mnist': [800, 10]}), 'laws.fit_range.mnist is [800, 10]'),
    (lambda d: d['laws'].update(compare=[['mnist', 'fifty_rendered']]),
     "laws.compare is 'fifty_rendered': no such curve of one set"),
    (lambda d: d['report'].update(scaling=['mnist', 'renderd']), "report.scaling is 'renderd'"),
    (lambda d: d['report'].update(panels={'real': ['mnist', 'renderd']}), "report.panels.real is 'renderd'"),
    (lambda d: d['report']['labels'].update(tset='on paper'), "(did you mean 'test'?)"),
    (lambda d: d['study'].update(classes=['zero', 'one', 'zero']), "study.classes names 'zero' twice"),
    (lambda d: d['classify']['curves']['mnist'].update(n_images=[0]), 'a point without any image'),
    (lambda d: d['classify']['curves']['mnist'].update(n_images=[-10]), 'classify.curves.mnist.n_images.0'),
    (lambda d: d['recipes']['convnext_digits']['optimizer'].update(lr='1e-3'), 'recipes.convnext_digits.optimizer.lr'),
    (lambda d: d['data']['sets'].update({'a/b': d['data']['sets']['mnist']}), 'a/b'),
    (lambda d: d['recipes']['convnext_digits']['optimizer'].pop('lr'),
     "key 'recipes.convnext_digits.optimizer.lr' is missing"),
    (lambda d: d['classify']['eval'].update(validation='valid'), "set 'mnist' has no split 'valid'"),
    (lambda d: d['recipes']['convnext_digits']['augment'].update(crop=8), 'less than the 8 pixels of an image'),
    (lambda d: d['data']['sets'].update(Mnist=d['data']['sets']['mnist']), 'differ by upper and lower case alone'),
    (lambda d: d['classify']['eval'].update(ood_splits=['test']), 'each with a name of its own'),
    (lambda d: d['classify']['eval'].update(within=['vale']),
     "classify.eval.within is 'vale': no such split under classify.eval (did you mean 'val'?)"),
    (lambda d: d['classify']['mixtures']['grid'].update(exposures='real', real_share=None),
     "grid.exposures is 'real': expected a real_share"),
    (lambda d: d['classify']['mixtures']['grid'].update(as_long='longer'), "grid.as_long is 'longer'"),
    (lambda d: d['classify']['mixtures']['grid'].update(as_long='rendered'), "a curve of the set 'mnist' alone"),
    (lambda d: d['classify']['curves']['mnist'].update(compute_sizes=[7]),
     'mnist.compute_sizes is 7: expected one of'),
    (lambda d: d['data']['sets']['rendered'].update(damage=dict(absent=['tree'])),
     "data.sets.rendered.damage.absent is 'tree': expected a class of the study (did you mean 'three'?)"),
    (lambda d: d['classify']['eval'].update(ood_set='digit'), "classify.eval.ood_set is 'digit'"),
    (lambda d: d['classify']['eval'].update(validation='test'), 'also a test split'),
    (lambda d: d['evaluators']['real_classifier'].update(recipe='convnext'),
     "evaluators.real_classifier.recipe is 'convnext': no such recipe under recipes"),
    (lambda d: d['classify'].update(recipe='convnext'), "no such recipe under recipes"),
    (lambda d: d['classify'].pop('recipe'), "none: neither here nor under classify.recipe"),
    (lambda d: d['prompts']['sets'].update(names={'templates': []}),
     'prompts.sets.names is empty: expected one of family, templates, by_class and file'),
    (lambda d: d['prompts']['sets'].update(names={'templates': ['{name}'], 'by_class': {'zero': ['0']}}),
     'given twice, by templates and by_class'),
    (lambda d: d['prompts']['sets'].update(names={'by_class': {'zero': ['0'], 'one': []}}),
     "prompts.sets.names.by_class has no prompt for class 'one'"),
    (lambda d: d['prompts']['sets'].update(names={'by_class': {'zeroo': ['0']}}),
     "by_class has words for 'zeroo', which is no class of the study (did you mean 'zero'?)"),
    (lambda d: own_words(d)['styles']['fill'].update(face=[]), 'prompts.sets.styles.fill.face is empty'),
    (lambda d: own_words(d)['styles']['fill'].pop('face'), 'nothing fills {face}'),
    (lambda d: d['prompts']['sets'].update(names={'templates': ['a digit']}), "'a digit' does not name the class"),
    (lambda d: d['prompts']['sets'].update(names={'templates': ['{name']}), "'{name' is not a template"),
    (lambda d: (own_words(d), d['prompts']['words']['description'].pop('nine')),
     "prompts.sets.described has no prompt for class 'nine': prompts.words.description has no words for it"),
    (lambda d: (own_words(d), d['prompts']['words']['description'].update(ten='x')),
     "prompts.words.description has words for 'ten'"),
    (lambda d: d['generate']['sources']['guidance_2'].update(guidance_scale=0.9),
     'generate.sources.guidance_2.guidance_scale is 0.9'),
    (lambda d: d['generate']['sources']['guidance_2'].update(model='mini_ds'),
     "generate.sources.guidance_2.model is 'mini_ds': no such model under models"),
    (lambda d: d['generate']['sources']['guidance_2'].update(prompts='tmplates'), "did you mean 'templates'?"),
    (lambda d: d['generate']['sources'].update(rendered=d['generate']['sources']['guidance_2']),
     "'rendered' is under data.sets and under generate.sources"),
    (lambda d: d['generate'].pop('n_images'), "key 'generate.sources.guidance_2.n_images' is missing"),
    (lambda d: d['generate']['sources']['guidance_2']['curve'].update(n_images=[50, 1601]), 'and the source has 1600'),
    (lambda d: d['models']['mini_sd'].update(type='sdxl'), 'models.mini_sd.type'),
    (lambda d: d['models']['mini_sd']['unet'].update(caption_dropout=0.0), 'models.mini_sd.unet.caption_dropout'),
    (lambda d: d['generate']['sources']['guidance_2'].update(guidance_scale=float('nan')),
     'generate.sources.guidance_2.guidance_scale is nan'),
    (lambda d: d['generate']['sources']['guidance_2'].update(n_images=9), 'at least one image for each of 10 classes'),
    (lambda d: own_words(d)['styles']['fill'].update(name=['x']),
     'prompts.sets.styles.fill.name: {name} is already filled with words about the class'),
    (lambda d: d['prompts']['sets'].update(names={'templates': ['{name:d}']}), 'without a format'),
    (lambda d: d['models']['mini_sd']['unet'].update(channels=[64, 100]), 'models.mini_sd.unet.channels.1 is 100'),
    (lambda d: d['models']['mini_sd']['text'].update(vocab_size=300), 'models.mini_sd.text.vocab_size is 300'),
    (lambda d: d['data'].update(image_size=6), 'data.image_size is 6, expected a multiple of 4'),
    (lambda d: d['laws']['model_selection']['prompt_set'].update(n_images=1601),
     "laws.model_selection.prompt_set.n_images is 1601: curve 'reference' has no such size"),
    (lambda d: d['classify']['curves'].update({'g7.5': d['classify']['curves']['mnist']}), 'g7.5'),
    (lambda d: d['classify']['curves'].update(guidance_2=d['classify']['curves']['mnist']),
     "curve 'guidance_2' is under classify.curves and under generate.sources"),
    (lambda d: d['classify']['mixtures']['grid'].update(real='rendered'), 'expected a set of real images'),
    (lambda d: d['classify']['mixtures']['grid'].update(synthetic='mnist'), 'expected a set of synthetic images'),
    (lambda d: d['laws']['model_selection']['prompt_set'].update(selected='mnist'),
     'laws.model_selection.prompt_set.selected'),
    (lambda d: d['data']['sets'].update(
        hub=dict(type='hub_images', input='build/nbs/01_data.ipynb', repo='a/b', revision='main')),
     "data.sets.hub.revision is 'main': expected a full commit hash"),
    (lambda d: d['data']['sets'].update(s=dict(type='tiles', input='x', pattern='(?P<class>.)', tile=8, drop='t.csv')),
     'drop and drop_column belong together'),
    (lambda d: d.update(merged=dict(u=dict(first='rendered', second='rendered'))), "merged.u names 'rendered' twice"),
    (lambda d: d.update(merged=dict(u=dict(first='u', second='rendered'))), "merged.u.first is 'u': no such set"),
    (lambda d: d['data']['sets']['mnist'].update(type='uci'), "data.sets.mnist.type is 'uci'"),
    (lambda d: d.update(reports={}), "unknown key 'reports' (did you mean 'report'?)"),
    (lambda d: d.pop('classify'), "key 'classify' is missing"),
]

@pytest.mark.parametrize('change, words', CASES)
def test_what_cannot_be_is_named(change, words):
    assert words in message(change)

def test_everything_that_is_wrong_is_named_at_once():
    def change(d):
        d['data']['image_sise'] = 8
        d['models']['mini_if']['unet']['steps'] = 0
        d['study'].pop('classes')
    m = message(change)
    assert len(m.splitlines()) == 3
    for words in ('data.image_sise', 'models.mini_if.unet.steps', "'study.classes' is missing"):
        assert words in m

OLD = load(ROOT/'tests'/'old_params.yaml')

def test_every_old_key_is_told_its_new_name():
    "A params.yaml of before the renaming gets its new names and nothing else."
    with pytest.raises(StudyError) as e:
        check_study(study(OLD))
    m = str(e.value)
    assert all('is from an older version: it is now' in line for line in m.splitlines())
    found = {old for old, _ in renamed_keys(OLD)}
    for key in ('judges', 'unions', 'data.sets.typeset.kind', 'models.mini_sd.kind',
                'recipes.convnext_digits.samples_at_100', 'classify.curves.grid.n_synthetic', 'laws.choices',
                'report.factors', 'classify.eval.shift_set'):
        assert key in found
    used = {pattern for pattern in RENAMED for old, now in renamed_keys(OLD) if now == RENAMED[pattern]}
    assert set(RENAMED)-used <= {'filters.*.judge'}, 'the old params.yaml shows every other renaming'

def test_sections_may_be_left_out():
    "A study of sets and curves alone: no models, sources, evaluators, laws or report."
    d = {k: GOOD[k] for k in ('study', 'data', 'recipes')}
    d['classify'] = {k: v for k, v in GOOD['classify'].items() if k != 'mixtures'}
    d['classify'] |= dict(curves={n: c for n, c in d['classify']['curves'].items() if c['set'] in d['data']['sets']})
    assert problems(study(d)) == []
    r = resolved(study(d))
    assert r['laws']['fit_range'] == {'mnist': [10, 3200], 'rendered': [50, 3200], 'shuffled': [50, 1600],
                                      'as_long': [25, 200]}
    assert r['models'] == r['evaluators'] == r['generate']['sources'] == {}

def test_defaults_are_filled_in_and_items_do_not_hold_what_others_track():
    r = resolved(study(GOOD))
    source, curves = r['generate']['sources']['guidance_4'], r['classify']['curves']
    assert source['n_images'] == 1600 and r['generate']['sources']['reference']['n_images'] == 3200
    assert 'curve' not in source and 'label' not in source
    assert curves['guidance_4']['seeds'] == 3 and curves['reference']['seeds'] == 5
    assert curves['mnist']['recipe']['schedule'] == {'name': 'cosine', 'warmup': 0.1}
    assert r['report']['labels']['mini_if'].startswith('generated, mini_if')
    assert r['quality']['sets']['rendered']['n_images'] == 1600 and r['quality']['n_compared'] == 2000
    assert json.loads(json.dumps(r)) == r

def test_files_that_are_not_params(tmp_path, capsys):
    assert main(['prepare', '--study', str(tmp_path)]) == 1
    assert 'params.yaml: no such file' in capsys.readouterr().err
    (tmp_path/'params.yaml').write_text('a: [1')
    with pytest.raises(StudyError, match='not readable as YAML'):
        read_yaml(tmp_path/'params.yaml')
    (tmp_path/'params.yaml').write_text('- 1')
    with pytest.raises(StudyError, match='expected sections'):
        read_yaml(tmp_path/'params.yaml')

def test_check_prints_everything_and_its_exit_code(tmp_path, capsys):
    assert main(['check', '--study', str(ROOT)]) == 0
    assert 'nothing is wrong' in capsys.readouterr().out
    (tmp_path/'params.yaml').write_text('studdy: {}\n')
    assert main(['check', '--study', str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "unknown key 'studdy' (did you mean 'study'?)" in out and "key 'data' is missing" in out

def test_yaml_is_read_as_dvc_reads_it(tmp_path):
    (tmp_path/'p.yaml').write_text('a: 1e-3\nb: no\nc: 010\nd: 12:30\n')
    from ruamel.yaml import YAML
    assert read_yaml(tmp_path/'p.yaml') == dict(YAML(typ='safe', pure=True).load((tmp_path/'p.yaml').read_text()))
    assert read_yaml(tmp_path/'p.yaml')['a'] == 0.001 and read_yaml(tmp_path/'p.yaml')['b'] == 'no'

PARTS = st.lists(st.one_of(st.integers(0, 2**31), st.text(max_size=8)), min_size=1, max_size=4)

@given(PARTS, PARTS)
def test_seeds_follow_their_names(a, b):
    assert 0 <= derive_seed(*a) < 2**63
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)

@given(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8), st.integers(0, 99))
def test_a_renamed_set_keeps_its_seeds(old, new, k):
    s = Study(ROOT, {'study': {'name': 's', 'classes': ['a', 'b'], 'seed_names': {'fresh': 'stale'}}})
    assert s.seed('order', 'fresh', k) == derive_seed(0, 'order', 'stale', k)
    names = ['stale' if p == 'fresh' else p for p in (old, new)]
    assert s.seed(old, new, k) == derive_seed(0, *names, k)
