"""Class tables and prompt sets: what WordNet says, what a table or a file of somebody's own may hold, and what is
refused."""
import os, shutil
from pathlib import Path
import pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from conftest import ROOT, dump, load
from synthscale.class_tables import (class_table, imagenet_table, read_class_table, read_synset, same_names, senses,
                                     tiny_wordnet, wordnet_table)
from synthscale.generate import source_plan
from synthscale.params import check_study
from synthscale.prompts import (FAMILIES, PromptSet, class_words, prompt_table,
                                read_prompts, write_prompt_set, write_prompts)
from synthscale.run import main
from synthscale.smoke import smoke_params
from synthscale.study import Study, StudyError, file_sha256

WORDNET = Path(os.environ.get('WORDNET', '/usr/share/wordnet'))
SHARED = ROOT.parent/'shared'/'data'/'imagenet_hypernyms.csv'
CRANES = [(['crane'], 'lifts heavy objects', [2]), (['crane', 'grus'], 'wading bird', [3]),
          (['lifting device'], 'a device for lifting', []), (['wader'], 'long-legged bird', [])]

@pytest.mark.skipif(not (WORDNET/'data.noun').exists(), reason=f'no WordNet in {WORDNET} (Debian: wordnet-base)')
def test_the_table_of_imagenet_is_what_wordnet_says():
    t = imagenet_table()
    for r in t.itertuples():
        s = read_synset(WORDNET, r.wnid)
        assert (s.lemmas[0], s.gloss) == (r.name, r.gloss) and r.wnid in senses(WORDNET, r.name)
        assert ', '.join(read_synset(WORDNET, h).lemmas[0] for h in s.hypernyms) == r.hypernyms

@pytest.mark.skipif(not SHARED.exists(), reason=f'no {SHARED.name} beside the checkout')
def test_the_table_of_imagenet_is_that_of_others():
    theirs, t = pd.read_csv(SHARED), imagenet_table()
    assert (theirs.wnid == t.wnid).all() and (theirs.definition == t.gloss).all()
    first = theirs.hypernym_lemmas.str.partition(',')[0]
    assert all(a in b.split(', ') for a, b in zip(first, t.hypernyms))

def test_imagenet_has_words_for_every_class_and_says_which_names_are_twice():
    for names, twice in (('wordnet', {'crane', 'maillot'}), ('openai', {'missile', 'sunglasses'})):
        t = imagenet_table(names)
        assert len(t) == t.wnid.nunique() == 1000 and (t != '').all().all() and set(same_names(t)) == twice
    with pytest.raises(StudyError, match='one of wordnet, openai'):
        imagenet_table('mine')

@given(st.lists(st.sampled_from('abcdefg'), min_size=1, max_size=6), st.data())
@settings(max_examples=30, deadline=None)
def test_any_wordnet_comes_back(tmp_path_factory, words, data):
    d = tmp_path_factory.mktemp('w')
    nouns = [([w], f'the letter {w}', data.draw(st.lists(st.integers(0, len(words)-1), max_size=2))) for w in words]
    ids = tiny_wordnet(d, nouns)
    for wnid, (lemmas, gloss, above) in zip(ids, nouns):
        s = read_synset(d, wnid)
        assert (list(s.lemmas), s.gloss, s.hypernyms) == (lemmas, gloss, tuple(ids[i] for i in above))
        assert list(senses(d, lemmas[0])) == [i for i, (l, _, _) in zip(ids, nouns) if l == lemmas]

ODD = {'no class column': (dict(name=['a']), "column 'class' is missing"),
       'a class of nobody': ({'class': ['a', 'c']}, "row 3: class 'c' is none of the study's"),
       'a class twice': ({'class': ['a', 'b', 'a']}, "row 4: class 'a' for the second time"),
       'a class that is lost': ({'class': ['b']}, "no row for class 'a'"),
       'an unknown id': ({'class': ['a', 'b'], 'wnid': ['n02012849', '2012849']}, "row 3: wnid '2012849'"),
       'one id for two': ({'class': ['a', 'b'], 'wnid': ['n02012849']*2}, 'also that of another class'),
       'a long gloss': ({'class': ['a', 'b'], 'gloss': ['x', 'y'*10000]}, 'row 3: gloss has 10000 characters')}

@pytest.mark.parametrize('odd', ODD)
def test_an_odd_class_table_is_refused(odd, tmp_path):
    columns, words = ODD[odd]
    pd.DataFrame(columns).to_csv(tmp_path/'t.csv', index=False)
    with pytest.raises(StudyError, match=words) as e:
        read_class_table(tmp_path/'t.csv', ['a', 'b'])
    assert 't.csv' in str(e.value)
    for name, data in (('none.csv', None), ('latin.csv', 'class,gloss\na,é\nb,x\n'.encode('latin-1'))):
        if data:
            (tmp_path/name).write_bytes(data)
        with pytest.raises(StudyError, match=name):
            read_class_table(tmp_path/name, ['a', 'b'])

def test_names_of_other_alphabets_are_names(tmp_path):
    pd.DataFrame({'class': ['a'], 'name': ['Käse ☃'], 'gloss': ['Ünïcode']}).to_csv(tmp_path/'t.csv', index=False)
    t = class_table('t.csv', tmp_path, ['a'])
    words = {'name': dict(a=t.name[0]), 'description': dict(a=t.gloss[0])}
    made = prompt_table(PromptSet(family='classnames + description'), ['a'], words)
    assert made.prompt.tolist() == ['Käse ☃, Ünïcode']

@pytest.fixture
def cranes(tmp_path):
    "A study of two classes with a WordNet that knows one of them in two senses."
    p = smoke_params()
    p['study']['classes'] = ['crane', 'zebra']
    keep = dict(study=p['study'], data=p['data'], classify=p['classify'], recipes=p['recipes'])
    dump(keep | {'prompts': {'classes': 'classes.csv', 'sets': {'d': {'family': 'classnames + description'}}}},
         tmp_path/'params.yaml')
    return tmp_path, tiny_wordnet(tmp_path/'wordnet', CRANES)

def test_the_tool_writes_a_table_to_edit_and_never_over_one(cranes, capsys):
    d, ids = cranes
    given = ['class-table', '--study', str(d), '--wordnet', str(d/'wordnet')]
    assert main([*given, '--sense', f'crane={ids[1]}']) == 0
    said, path = capsys.readouterr().out, d/'prompts'/'classes.csv'
    assert 'crane: sense 2 of 2: wading bird' in said and 'zebra: no noun of WordNet' in said
    t = pd.read_csv(path, keep_default_na=False)
    assert t.other_senses[0] == f'{ids[0]}: lifts heavy objects' and t.hypernyms[0] == 'wader'
    assert main(given) == 1 and 'may have been edited' in capsys.readouterr().err
    with pytest.raises(StudyError, match="nothing fills {description} for class 'zebra'"):
        write_prompts(Study(d))
    t.loc[1, 'gloss'] = 'a horse with stripes'
    t.to_csv(path, index=False)
    write_prompts(Study(d))
    assert read_prompts(Study(d), 'd').prompt.tolist() == ['crane, wading bird', 'zebra, a horse with stripes']
    path.unlink()
    for wrong, words in (('crane', 'CLASS=WNID'), ('cran=n1', "did you mean 'crane'"), ('crane=n1', 'eight digits')):
        assert main([*given, '--sense', wrong]) == 1 and words in capsys.readouterr().err

def test_no_wordnet_says_where_it_comes_from(tmp_path):
    with pytest.raises(StudyError, match='Debian: wordnet-base'):
        wordnet_table(['crane'], tmp_path)

KINDS = [(dict(family='CLIP templates', templates=['a {name}']), 'given twice, by family and templates'),
         (dict(), 'is empty: expected one of'), (dict(family='classnames + hypernyms'), 'needs prompts.classes'),
         (dict(family='class names'), "'classnames'"), (dict(file='../x.csv'), 'file'),
         (dict(templates=['a {hypernyms} thing']), 'nothing fills {hypernyms}')]

@pytest.mark.parametrize('spec, words', KINDS)
def test_a_prompt_set_is_of_one_kind(spec, words):
    p = smoke_params()
    p['prompts']['sets']['odd'] = spec
    with pytest.raises(StudyError) as e:
        check_study(Study('.', p))
    assert words in str(e.value)

def test_families_are_the_same_every_time():
    words = {'description': {'dog': 'a pet'}, 'hypernyms': {'dog': 'canine'}}
    for f in FAMILIES:
        a, b = (prompt_table(PromptSet(family=f), ['dog'], words) for _ in range(2))
        assert a.equals(b) and len(a) == (80 if f == 'CLIP templates' else 1) and a.prompt.str.contains('dog').all()

def test_words_of_ones_own_stand_over_those_of_the_table(tmp_path):
    p = smoke_params()
    p['study']['classes'] = ['goldfish', 'n02012849']
    p['prompts'] = dict(classes='imagenet', words=dict(name=dict(goldfish='gold fish')), sets={})
    words = class_words(Study(tmp_path, p))
    assert words['name'] == dict(goldfish='gold fish') and words['hypernyms']['n02012849'] == 'wading bird'

def test_sets_that_need_no_model_are_the_tables_they_were(tmp_path):
    "Bytes of the tables of the first study `digits`, by their hash from before there were sets that a model writes."
    was = dict(names='0b711a03182439985e9b2ec274ee2e84c312d510539f03aef7d3fa9a6e7c6d93',
               described='07b9c5e72244db581cd005283b039b9491503265491345b215734a244719d94b',
               styles='8bbcc5373a6f4c06599f40ad235ae55df1e681e02bdbd8dc44d12c784174bf94')
    s = Study(tmp_path, load(ROOT/'params.yaml') | dict(prompts=load(ROOT/'tests'/'old_params.yaml')['prompts']))
    for name, sha in was.items():
        write_prompt_set(s, name)
        assert file_sha256(tmp_path/'runs'/'prompts'/f'{name}.csv') == sha
    with pytest.raises(StudyError, match="did you mean 'styles'"):
        write_prompt_set(s, 'style')

def test_families_of_the_embedded_study_are_the_tables_they_were(tmp_path):
    "By their hash from when the study was declared; the words come from its class table."
    was = dict(templates='aca047ff14b7d8f2700d7931888b3d764f54bb61e8942de415e14c080a95dc60',
               classnames='efd1c2511aa66ec2183acad4fc301a3421f52d6d80fbdfdcedd8103e277d4619',
               descriptions='46412a578b8b729ae7d3c0b47954b37df91cdf45743751f93ec32abf1280b83a',
               hypernyms='0551c902e81376848316f7072f8059bd0034aa1a3f443e7b685b0e8e27d65df8')
    s = Study(tmp_path, load(ROOT/'params.yaml'))
    shutil.copytree(ROOT/'prompts', tmp_path/'prompts')
    assert {*was} == {*s.prompts.sets}
    for name, sha in was.items():
        write_prompt_set(s, name)
        assert file_sha256(tmp_path/'runs'/'prompts'/f'{name}.csv') == sha

@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_with_fewer_prompts_than_images_each_is_used_equally_often(counts, n):
    p = smoke_params()
    p['study']['classes'] = [f'c{i}' for i in range(len(counts))]
    texts = [[f'{i} {j}' for j in range(k)] for i, k in enumerate(counts)]
    plan = source_plan(Study('.', p), 'names_g2', texts, 0, n)
    images = plan.groupby('label').size()
    for label, used in plan.groupby('label').prompt:
        times = used.value_counts()
        assert times.max()-times.min() <= 1 and len(times) == min(counts[label], len(used))
    assert images.max()-images.min() <= 1 and plan.seed.is_unique
