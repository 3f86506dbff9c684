"What a reader of image sets refuses, what it costs, and which images a curve takes."
import io, json, subprocess, tarfile
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from synthscale.curves import OneSetCurve
from synthscale.prompts import PromptSet, PromptsSection, check_prompts, prompt_table
from synthscale.shards import (_own_files, _own_samples, balanced_order, check_set, check_subset, load_set, own_order,
                               read_manifest, replace_folder, tar_samples, write_set, write_shard)
from synthscale.study import StudyError, validated

CLASSES = ['no', 'yes', 'maybe']

def images(n, size=8):
    rng = np.random.default_rng(0)
    return [dict(split='train' if i < n-3 else 'test', label=i % 3, caption=f'a {i}',
                 image=rng.integers(0, 255, (size, size, 1), np.uint8)) for i in range(n)]

@pytest.fixture(params=[8, 64], ids=['compressed', 'plain'])
def folder(request, tmp_path):
    "A set in shards of four images, compressed or, as larger images are, not."
    write_set(tmp_path/'sets/a', images(15, request.param), CLASSES, 4)
    return tmp_path/'sets/a'

def both(m, i, j, columns):
    "The values of two rows exchanged."
    m.loc[[i, j], columns] = m.loc[[j, i], columns].to_numpy()
    return m

DAMAGE = {'two labels swapped': lambda m: both(m, 0, 1, ['label']),
          'two labels and classes swapped': lambda m: both(m, 0, 1, ['label', 'class']),
          'two captions swapped': lambda m: both(m, 0, 1, ['caption']),
          'a caption of its own': lambda m: m.assign(caption=['x', *m.caption[1:]]),
          'an empty caption': lambda m: m.assign(caption=[None, *m.caption[1:]]),
          'a row dropped': lambda m: m.drop(index=2),
          'the last row of a shard dropped': lambda m: m.drop(index=3),
          'a shard dropped': lambda m: m[m.shard != m.shard[0]],
          'two rows exchanged': lambda m: m.iloc[[1, 0, *range(2, len(m))]],
          'all rows turned round': lambda m: m[::-1],
          'a row twice': lambda m: m.iloc[[0, *range(len(m))]],
          'a label of 99': lambda m: m.assign(label=[99, *m.label[1:]]),
          'a negative label': lambda m: m.assign(label=[-1, *m.label[1:]]),
          'labels as floats': lambda m: m.assign(label=m.label.astype(float)),
          'all labels of a class': lambda m: m.assign(label=m.label.replace(2, 7)),
          'another split': lambda m: m.assign(split=['test', *m.split[1:]]),
          'a shard elsewhere': lambda m: m.assign(shard='../b/'+m.shard),
          'another image hash': lambda m: both(m, 0, 1, ['sha256'])}

@pytest.mark.parametrize('folder, lazy', [(8, False), (64, False), (64, True)], indirect=['folder'],
                         ids=['compressed', 'plain', 'plain, in place'])
@pytest.mark.parametrize('how', DAMAGE)
def test_a_manifest_that_is_not_that_of_its_shards_is_refused(folder, how, lazy):
    "Whatever a row says of label, caption, place or image is compared with the shard."
    m = read_manifest(folder)
    np.asarray(load_set(folder, lazy=lazy).images)
    DAMAGE[how](m).to_parquet(folder/'manifest.parquet', index=False)
    with pytest.raises(StudyError, match='sets/a'):
        np.asarray(load_set(folder, lazy=lazy).images)

def test_rows_of_a_generated_set_say_what_its_recipe_says(tmp_path):
    made = dict(model='m', model_sha256='ab', guidance_scale=2., steps=12, scheduler='s')
    d = tmp_path/'sets/a'
    write_set(d, [s | made | dict(prompt=s['caption']) for s in images(9)], CLASSES)
    recipe = dict(model='m', model_sha256='ab', classes=CLASSES,
                  sampling=dict(guidance_scale=2., steps=12, scheduler='s'))
    (d/'recipe.json').write_text(json.dumps(recipe))
    m = read_manifest(d)
    wrong = dict(model='n', model_sha256='', guidance_scale=7.5, steps=13, scheduler='t', prompt='x', label=8)
    for column, value in wrong.items():
        m.assign(**{column: [value, *m[column][1:]]}).to_parquet(d/'manifest.parquet', index=False)
        with pytest.raises(StudyError, match='manifest.parquet'):
            read_manifest(d)

def test_another_set_in_place_of_this_one_is_refused(tmp_path):
    for name in ('a', 'b'):
        write_set(tmp_path/'sets'/name, images(9), CLASSES)
    replace_folder(tmp_path/'sets/b', tmp_path/'sets/a')
    with pytest.raises(StudyError, match='those of another set'):
        read_manifest(tmp_path/'sets/a')

@pytest.mark.parametrize('split', ['v2.0', '', '..', '-train', '+x', 'a/b', 'a b', 'é'])
def test_a_split_that_no_key_can_carry_is_refused(tmp_path, split):
    with pytest.raises(StudyError, match='the name of a split'):
        write_set(tmp_path/'a', [s | dict(split=split) for s in images(6)], CLASSES)

def test_a_few_images_are_the_same_as_in_the_whole_set_and_other_shards_are_not_read(folder):
    whole = load_set(folder, 'train')
    some = load_set(folder, 'train', rows=[9, 1, 8])
    assert (some.images == whole.images[[9, 1, 8]]).all() and some.labels.tolist() == [0, 1, 2]
    unread = folder/read_manifest(folder).shard[4]
    unread.unlink()
    assert (load_set(folder, 'train', rows=[9, 1, 8]).images == some.images).all()

def slow_order(labels, seed):
    "`balanced_order` as it was, images times classes."
    rng, rank = np.random.default_rng(seed), np.empty(len(labels), np.int64)
    for c in np.unique(labels):
        rank[rng.permutation(np.flatnonzero(labels == c))] = np.arange((labels == c).sum())
    turn = rng.random((rank.max(initial=0)+1, labels.max(initial=0)+1))
    return np.lexsort((turn[rank, labels], rank))

@given(st.lists(st.integers(0, 9), max_size=60), st.integers(0, 300), st.integers(0, 99))
def test_the_balanced_order_is_the_old_one(few, more, seed):
    "Also where one class is much larger than the others, whose table of turns is not made."
    labels = np.array([*few, *[900]*(more if few else 0)], np.int64)
    assert (balanced_order(labels, seed) == slow_order(labels, seed)).all()

@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.integers(0, 99))
def test_subsets_follow_the_shares_of_the_set(counts, seed):
    labels, counts = np.repeat(np.arange(len(counts)), counts), np.array(counts)
    order = own_order(labels, seed)
    assert (np.sort(order) == np.arange(len(labels))).all()
    for n in range(len(labels)+1):
        got = np.bincount(labels[order[:n]], minlength=len(counts))
        assert (abs(got-n*counts/counts.sum()) < len(counts)).all()

def test_what_an_unbalanced_folder_gives():
    with pytest.raises(StudyError, match='largest possible: 80; .*balance: own'):
        check_subset('pets', [500, 40], 540)
    check_subset('pets', [500, 40], 540, 'own')
    with pytest.raises(StudyError, match='541 were asked for'):
        check_subset('pets', [500, 40], 541, 'own')
    with pytest.raises(StudyError, match='balance'):
        validated(OneSetCurve, dict(set='a', n_images=[1], balance='mine'), 'x', 'params.yaml')

@pytest.mark.parametrize('t', ['{name.__class__.__mro__}', '{0}', '{}', '{a.b}', '{name[0]}', '{name!r}', '{name:>10}',
                               '{name:{w}}', '{nom}', '{name', '{é}'])
def test_templates_take_identifiers_only(t):
    with pytest.raises(StudyError, match='template'):
        prompt_table(PromptSet(templates=[t]), CLASSES, {})

@pytest.mark.parametrize('key', ['a.b', '0', 'name.upper', 'a-b', 'a+b', 'a\n', ''])
def test_keys_of_fill_and_words_are_identifiers(key):
    for section in (dict(sets=dict(s=dict(fill={key: ['x']}))), dict(words={key: dict(no='x')})):
        with pytest.raises(StudyError, match='prompts'):
            validated(PromptsSection, section, 'prompts', 'params.yaml')

def test_checks_pass_over_a_table_once():
    "20,000 classes: images times classes would be 400 million comparisons in Python, hours."
    classes = [f'c{i}' for i in range(20000)]
    m = pd.DataFrame({'key': classes, 'split': 'train', 'class': classes, 'sha256': classes, 'label': range(20000)})
    check_set(m, 'large', classes)
    check_prompts(m.assign(prompt='x'), 'large', classes)
    assert len(balanced_order(m.label, 0)) == 20000

@pytest.mark.parametrize('column', ['extra', 'device', 'seed'])
def test_a_column_that_nothing_else_knows_is_held_by_the_hash_of_the_file(tmp_path, column):
    "What neither shards nor recipe have: the manifest has a hash of its own, which `sha256sum -c` reads, too."
    d = tmp_path/'sets/a'
    write_set(d, [s | {column: 7} for s in images(9)], CLASSES)
    assert subprocess.run(['sha256sum', '-c', 'manifest.sha256'], cwd=d, capture_output=True).returncode == 0
    m = read_manifest(d)
    m.assign(**{column: [8, *m[column][1:]]}).to_parquet(d/'manifest.parquet', index=False)
    for read in (read_manifest, load_set):
        with pytest.raises(StudyError, match='its hash is not that of manifest.sha256'):
            read(d)
    (d/'manifest.sha256').unlink()
    assert len(read_manifest(d)) == 9                    # a set from before there were hashes

FOREIGN = {'a long name': (tarfile.GNU_FORMAT, 'x'*120+'.png', tarfile.REGTYPE),
           'a name that is not ASCII': (tarfile.PAX_FORMAT, 'é.png', tarfile.REGTYPE),
           'a folder': (tarfile.USTAR_FORMAT, 'y.png', tarfile.DIRTYPE),
           'another format': (tarfile.GNU_FORMAT, 'y.png', tarfile.REGTYPE)}

def as_read(samples):
    return [(k, {e: bytes(v) for e, v in s.items()}) for k, s in samples]

@pytest.mark.parametrize('end', ['.tar', '.tar.gz'])
@pytest.mark.parametrize('how', ['ours', *FOREIGN])
def test_the_fast_reader_reads_what_the_other_one_does_or_leaves_it_to_it(tmp_path, how, end):
    "Shards are read by their headers alone where these are as `write_shard` writes them."
    path = tmp_path/f'a-000000{end}'
    write_shard(path, [dict(key=f'train-{i}', image=bytes([i])*(i*300), label=i, caption='c'*i) for i in range(5)])
    if how != 'ours':
        format, name, kind = FOREIGN[how]
        with tarfile.open(path, 'w:gz' if end == '.tar.gz' else 'w', format=format) as t:
            i = tarfile.TarInfo(name)
            i.size, i.type = 0 if kind == tarfile.DIRTYPE else 3, kind
            t.addfile(i, io.BytesIO(b'abc'))
    assert bool(_own_files(path)) == (how == 'ours')
    assert as_read(_own_samples(path)) == as_read(tar_samples(path))

def test_a_cut_shard_is_not_read_fast(tmp_path):
    path = tmp_path/'a-000000.tar'
    write_shard(path, [dict(key='train-0', image=b'x'*3000, label=0, caption='')])
    whole = path.read_bytes()
    for n in (512, 1000, 3584, 4096, 5000):
        path.write_bytes(whole[:n])
        assert _own_files(path) is None, n
