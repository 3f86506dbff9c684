"Image sets: nested and balanced subsets, shards that notice damage, and other people's images."
import io, os, tarfile
from pathlib import Path
import numpy as np, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from conftest import ROOT, load
from synthscale.data import (balanced_order, build_set, check_subset, decode, encode_png, folder_samples, load_set, read_manifest, shard_samples, subset, write_set)
from synthscale.smoke import smoke_inputs, smoke_params, smoke_study
from synthscale.study import Study, StudyError

CLASSES = ['cat', 'dog']

@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(0, 2**40))
def test_order_is_a_permutation_with_balanced_prefixes(labels, seed):
    labels = np.array(labels)
    o = balanced_order(labels, seed)
    assert sorted(o) == list(range(len(labels)))
    total = np.bincount(labels, minlength=5)
    for n in range(len(o)+1):
        got = np.bincount(labels[o[:n]], minlength=5)
        level = got.max()
        assert all(g >= min(t, level-1) for g, t in zip(got, total))       # no class lags behind by more than one, unless it is used up
    assert (o == balanced_order(labels, seed)).all()

def test_seeds_have_orders_of_their_own():
    labels = np.arange(200) % 10
    firsts = {tuple(sorted(balanced_order(labels, s)[:20])) for s in range(50)}
    assert len(firsts) == 50

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    rng = np.random.default_rng(0)
    d = tmp_path_factory.mktemp('small')/'s'
    samples = [dict(split='train', label=i % 2, image=rng.integers(0, 255, (8, 8, 3), np.uint8), caption='') for i in range(12)]
    write_set(d, samples, CLASSES, shard_size=6)
    return d

@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_anywhere_in_a_shard_is_found_and_named(small, data):
    shard = small/'s-000001.tar.gz'
    good = shard.read_bytes()
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good)-1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        shard.write_bytes(bad)
        with pytest.raises(StudyError, match='s-000001.tar.gz: the shard is damaged'): load_set(small)
    finally: shard.write_bytes(good)

def test_missing_pieces_are_named(small, tmp_path):
    with pytest.raises(StudyError, match='has not been made yet'): load_set(tmp_path/'nothing')
    with pytest.raises(StudyError, match="no split 'tests'.*train"): load_set(small, 'tests')
    shard = small/'s-000000.tar.gz'
    good = shard.read_bytes()
    shard.unlink()
    with pytest.raises(StudyError, match='s-000000.tar.gz: the shard is missing'): load_set(small)
    shard.write_bytes(good)
    (tmp_path/'x').mkdir(); (tmp_path/'x'/'manifest.parquet').write_bytes(b'no')
    with pytest.raises(StudyError, match='not a readable manifest'): read_manifest(tmp_path/'x')

def test_more_images_than_there_are(small):
    s = load_set(small)
    assert len(subset(s, 12, 0, 2)) == 12
    with pytest.raises(StudyError, match="set 's' has 12 images, 14 were asked for"): subset(s, 14, 0, 2)
    with pytest.raises(StudyError, match='largest possible: 6'): check_subset('s', [3, 9], 8)

def image(shade, size=(20, 12)): return Image.new('RGB', size, (shade, 0, 255-shade))

@pytest.fixture
def folder(tmp_path):
    for split in ('train', 'test'):
        for c in CLASSES:
            (tmp_path/split/c).mkdir(parents=True)
            for i in range(3): image(i*20+(c == 'dog')*100+(split == 'test')*10).save(tmp_path/split/c/f'{i}.jpg')
    return tmp_path

def test_image_folder(folder):
    s = list(folder_samples(folder, CLASSES, 8, 3))
    assert [x['split'] for x in s].count('train') == 6 and {x['label'] for x in s} == {0, 1} and s[0]['image'].shape == (8, 8, 3)
    assert {x['split'] for x in folder_samples(folder/'train', CLASSES, 8, 1)} == {'train'}

def test_image_folder_faults(folder):
    (folder/'train'/'dgo').mkdir()
    with pytest.raises(StudyError, match="'dgo' is not a class of the study .did you mean 'dog'"): list(folder_samples(folder, CLASSES, 8, 3))
    os.rmdir(folder/'train'/'dgo')
    with pytest.raises(StudyError, match="no folder for class 'bird'"): list(folder_samples(folder, [*CLASSES, 'bird'], 8, 3))
    (folder/'train'/'cat'/'0.jpg').write_bytes(b'not a jpeg')
    with pytest.raises(StudyError, match='cat/0.jpg: not a readable image'): list(folder_samples(folder, CLASSES, 8, 3))

def shard(path, members):
    with tarfile.open(path, 'w') as t:
        for name, data in members:
            i = tarfile.TarInfo(name); i.size = len(data); t.addfile(i, io.BytesIO(data))

def png(shade):
    f = io.BytesIO(); image(shade).save(f, 'PNG'); return f.getvalue()

def test_other_peoples_shards(tmp_path):
    shard(tmp_path/'a.tar', [('../../evil.png', png(1)), ('../../evil.cls', b'0'), ('dir/b.jpg', png(2)), ('dir/b.cls', b'dog'), ('dir/b.txt', b'a dog')])
    s = list(shard_samples(tmp_path, CLASSES, 8, 3))
    assert [x['label'] for x in s] == [0, 1] and s[1]['caption'] == 'a dog'
    m = write_set(tmp_path/'sets'/'mine', s, CLASSES)
    assert not (tmp_path.parent/'evil.png').exists() and list(m.key) == ['train-0000000', 'train-0000001']
    shard(tmp_path/'a.tar', [('x.png', png(1)), ('x.cls', b'7')])
    with pytest.raises(StudyError, match="a.tar:x: class '7' is none of the study's"): list(shard_samples(tmp_path, CLASSES, 8, 3))
    shard(tmp_path/'a.tar', [('x.png', png(1))])
    with pytest.raises(StudyError, match="sample x has .*expected an image and 'cls'"): list(shard_samples(tmp_path, CLASSES, 8, 3))
    (tmp_path/'a.tar').write_bytes(b'\x1f\x8b broken')
    with pytest.raises(StudyError, match='a.tar: the shard is damaged'): list(shard_samples(tmp_path, CLASSES, 8, 3))

def test_a_study_without_its_data(tmp_path):
    from conftest import dump
    dump(smoke_params(), tmp_path/'params.yaml')
    with pytest.raises(StudyError, match="digits.csv.gz: the input of set 'digits' is not there; 'dvc pull'"): build_set(Study(tmp_path), 'digits')

@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.integers(2, 20))
@settings(max_examples=40, deadline=None)
def test_any_image_comes_to_the_study_size(w, h, channels, size):
    out = decode(encode_png(np.zeros((h, w, 3), np.uint8)), size, channels)
    assert out.shape == (size, size, channels)

@given(st.integers(0, 2**32-1))
@settings(max_examples=10, deadline=None)
def test_a_longer_typeset_corpus_begins_with_the_shorter_one(seed):
    from synthscale.data import typeset_samples
    spec = Study(smoke_study()).data.sets['typeset']
    make = lambda n: [s['image'].tobytes()+s['caption'].encode() for s in typeset_samples(spec.model_copy(update=dict(splits=dict(train=n))), smoke_inputs()/'fonts', smoke_params()['study']['classes'], seed)]
    assert make(12)[:6] == make(6)
