"Image sets: nested and balanced subsets, shards that notice damage, and other people's images."
import io, shutil, tarfile, zipfile
from functools import partial
import numpy as np, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from conftest import ROOT
from pydantic import TypeAdapter
from synthscale.data import (SetSpec, build_set, folder_entries, hold_out, hub_entries, image_samples, named_entries,
                             rendered_samples, shard_samples, tile_entries, translate, usable)
from synthscale.params import check_study
from synthscale.shards import (balanced_order, check_subset, decode, encode_png, load_set, read_manifest, subset,
                               write_set)
from synthscale.smoke import smoke_inputs, smoke_params, smoke_study
from synthscale.study import Study, StudyError, derive_seed

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
        # no class lags behind by more than one, unless it is used up
        assert all(g >= min(t, level-1) for g, t in zip(got, total))
    assert (o == balanced_order(labels, seed)).all()

def test_seeds_have_orders_of_their_own():
    labels = np.arange(200) % 10
    firsts = {tuple(sorted(balanced_order(labels, s)[:20])) for s in range(50)}
    assert len(firsts) == 50

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    rng = np.random.default_rng(0)
    d = tmp_path_factory.mktemp('small')/'s'
    samples = [dict(split='train', label=i % 2, image=rng.integers(0, 255, (8, 8, 3), np.uint8), caption='')
               for i in range(12)]
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
        with pytest.raises(StudyError, match='s-000001.tar.gz: the shard is damaged'):
            load_set(small)
    finally:
        shard.write_bytes(good)

def test_missing_pieces_are_named(small, tmp_path):
    with pytest.raises(StudyError, match='has not been made yet'):
        load_set(tmp_path/'nothing')
    with pytest.raises(StudyError, match="no split 'tests'.*train"):
        load_set(small, 'tests')
    shard = small/'s-000000.tar.gz'
    good = shard.read_bytes()
    shard.unlink()
    with pytest.raises(StudyError, match='s-000000.tar.gz: the shard is missing'):
        load_set(small)
    shard.write_bytes(good)
    (tmp_path/'x').mkdir()
    (tmp_path/'x'/'manifest.parquet').write_bytes(b'no')
    with pytest.raises(StudyError, match='not a readable manifest'):
        read_manifest(tmp_path/'x')

def test_more_images_than_there_are(small):
    s = load_set(small)
    assert len(subset(s, 12, 0, 2)) == 12
    with pytest.raises(StudyError, match="set 's' has 12 images, 14 were asked for"):
        subset(s, 14, 0, 2)
    with pytest.raises(StudyError, match='largest possible: 6'):
        check_subset('s', [3, 9], 8)

def image(shade, size=(20, 12)):
    return Image.new('RGB', size, (shade, 0, 255-shade))

@pytest.fixture
def folder(tmp_path):
    for split in ('train', 'test'):
        for c in CLASSES:
            (tmp_path/split/c).mkdir(parents=True)
            for i in range(3):
                image(i*20+(c == 'dog')*100+(split == 'test')*10).save(tmp_path/split/c/f'{i}.jpg')
    return tmp_path

def spec(kind, **kw):
    return TypeAdapter(SetSpec).validate_python(dict(type=kind, input='.') | kw)

def read(entries, spec, classes=CLASSES, size=8, channels=3, lost=None):
    "All that `build_set` does with a listing, but for writing."
    lost = [] if lost is None else lost
    found = usable(translate(entries, spec, classes, 'mine'), spec, size, channels, lost)
    return list(image_samples(hold_out(found, spec, 0, 'mine'), spec, size, channels))

def folder_samples(path, classes, size, channels, names={}, **kw):
    s = spec('imagefolder', classes=names, **kw)
    known = {*classes, *s.classes, *map(str, range(len(classes)))}
    return read(folder_entries(path, known), s, classes, size, channels)

def test_image_folder(folder):
    s = folder_samples(folder, CLASSES, 8, 3)
    assert [x['split'] for x in s].count('train') == 6 and {x['label'] for x in s} == {0, 1}
    assert s[0]['image'].shape == (8, 8, 3)
    assert {x['split'] for x in folder_samples(folder/'train', CLASSES, 8, 1)} == {'train'}

def test_image_folder_faults(folder):
    shutil.copytree(folder/'train'/'dog', folder/'train'/'dgo')
    with pytest.raises(StudyError, match="'dgo' is not a class of the study .did you mean 'dog'"):
        folder_samples(folder, CLASSES, 8, 3)
    shutil.rmtree(folder/'train'/'dgo')
    words = "set 'mine', split 'test': no image of class 'bird': the class is missing from this set"
    with pytest.raises(StudyError, match=words):
        folder_samples(folder, [*CLASSES, 'bird'], 8, 3)
    shutil.copytree(folder/'train'/'cat', folder/'train'/'deep'/'er')
    with pytest.raises(StudyError, match="train/deep/er/0.jpg: 'deep' is not a class of the study"):
        folder_samples(folder, CLASSES, 8, 3)
    shutil.rmtree(folder/'train'/'deep')
    (folder/'train'/'cat'/'0.jpg').write_bytes(b'not a jpeg')
    with pytest.raises(StudyError, match='cat/0.jpg: not a readable image'):
        folder_samples(folder, CLASSES, 8, 3)
    lost = []
    s = spec('imagefolder', unreadable='skip')
    assert len(read(folder_entries(folder, set(CLASSES)), s, lost=lost)) == 11
    assert 'cat/0.jpg' in lost[0]['file'] and 'not a readable image' in lost[0]['reason']

def test_a_zip_is_read_as_its_folder_is_whatever_its_names_say(folder, tmp_path):
    (tmp_path/'zips').mkdir()
    with zipfile.ZipFile(tmp_path/'zips'/'a.zip', 'w') as z:
        for f in sorted(folder.rglob('*.jpg')):
            z.write(f, f.relative_to(folder))
        z.writestr('notes.txt', 'no image')
    a, b = folder_samples(folder, CLASSES, 8, 3), folder_samples(tmp_path/'zips'/'a.zip', CLASSES, 8, 3)
    assert len(a) == len(b) == 12
    assert all((x['image'] == y['image']).all() for x, y in zip(a, b))
    assert all((x['split'], x['label']) == (y['split'], y['label']) for x, y in zip(a, b))
    with zipfile.ZipFile(tmp_path/'zips'/'evil.zip', 'w') as z:
        z.writestr('../../cat/evil.jpg', b'x')
    with pytest.raises(StudyError, match='evil.jpg'):
        folder_samples(tmp_path/'zips'/'evil.zip', CLASSES, 8, 3)
    assert not list(tmp_path.parent.rglob('evil.jpg'))
    (tmp_path/'zips'/'broken.zip').write_bytes(b'PK no')
    with pytest.raises(StudyError, match='broken.zip: expected a folder or a zip'):
        folder_samples(tmp_path/'zips'/'broken.zip', CLASSES, 8, 3)

WNIDS = ['n01440764', 'n01443537', 'n01484850', 'n01491361']

def test_the_test_sets_of_imagenet_as_people_have_them(tmp_path):
    """ImageNet and -Sketch: folders by wnid; -R and -A: some of them; -V2: folders by number; ObjectNet: names of its
    own, a red frame, classes that ImageNet lacks."""
    def put(f, k):
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 12, 3), 20*k, np.uint8)).save(f)
    for k, w in enumerate(WNIDS):
        put(tmp_path/'val'/w/'ILSVRC2012_val_00000001.JPEG', k)
        put(tmp_path/'v2'/str(k)/'a.jpeg', k)
    for k in (1, 3):
        put(tmp_path/'r'/WNIDS[k]/'art_0.jpg', k)
    for k, c in enumerate(('Air freshener', 'Alarm clock')):
        (tmp_path/'objectnet'/c).mkdir(parents=True)
        inner = np.full((12, 12, 3), 20*k+40, np.uint8)
        framed = np.pad(inner, ((2, 2), (2, 2), (0, 0)), constant_values=255)
        Image.fromarray(framed).save(tmp_path/'objectnet'/c/'x.png')
    go = lambda d, **kw: [(s['split'], s['label']) for s in folder_samples(tmp_path/d, WNIDS, 12, 3, **kw)]
    assert go('val', splits=dict(train='val')) == go('v2', splits=dict(train='val')) == [('val', k) for k in range(4)]
    assert go('r', splits=dict(train='r'), fewer_classes=True) == [('r', 1), ('r', 3)]
    with pytest.raises(StudyError, match="no image of class 'n01440764'"):
        go('r', splits=dict(train='r'))
    own = {'Air freshener': None, 'Alarm clock': WNIDS[2]}
    s = folder_samples(tmp_path/'objectnet', WNIDS, 12, 3, names=own, fewer_classes=True, border=2)
    assert [x['label'] for x in s] == [2] and s[0]['image'].max() == 60
    with pytest.raises(StudyError, match="class 'Alarm clock' is not in data.sets.mine.classes"):
        go('objectnet', names={'Air freshener': None}, fewer_classes=True)

def test_maps_that_cannot_be(folder):
    def message(**kw):
        p = smoke_params()
        p['data']['sets']['mine'] = dict(type='files', input='x', pattern='(?P<class>.*)') | kw
        with pytest.raises(StudyError) as e:
            check_study(Study('.', p))
        return str(e.value)
    words = "data.sets.mine.classes.a is 'zeero': no such class of the study (did you mean 'zero'?)"
    assert words in message(classes=dict(a='zeero'))
    assert "data.sets.mine.classes leads nothing to class 'one' (9 such classes)" in message(classes=dict(a='zero'))
    assert 'not a regular expression' in message(pattern='(?P<class>')
    assert 'expected a group (?P<class>...)' in message(pattern='.*')
    with pytest.raises(StudyError, match="split 'test' is not in data.sets.mine.splits"):
        folder_samples(folder, CLASSES, 8, 3, splits=dict(train='train'))
    with pytest.raises(StudyError, match="hold_out wants 7 images of split 'train', which has 6"):
        folder_samples(folder, CLASSES, 8, 3, hold_out=dict(val=7))
    s = folder_samples(folder, CLASSES, 8, 3, hold_out=dict(val=2), hold_out_from='test')
    assert [x['split'] for x in s] == ['test']*4+['train']*6+['val']*2 and sorted(x['label'] for x in s[-2:]) == [0, 1]

@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_repeats_is_dropped_once_and_held_out_images_are_nobody_elses(tmp_path, data):
    shades = data.draw(st.lists(st.tuples(st.sampled_from(CLASSES), st.integers(0, 11)), min_size=4, max_size=24))
    more = [('cat', 100), ('dog', 101), ('cat', 102), ('dog', 103)]       # of each class one is held out and one stays
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
        for k, (c, v) in enumerate([*shades, *more]):
            z.writestr(f'{c}-{k:03d}.png', encode_png(np.full((4, 4, 3), v, np.uint8)))
    lost, s = [], spec('files', pattern=r'(?P<class>\w+)-\d+\.png', duplicates='drop', hold_out=dict(val=2),
                       max_left_out=1.)
    got = read(named_entries(tmp_path/'a.zip', s.pattern), s, size=4, lost=lost)
    pixels = [x['image'].tobytes() for x in got]
    assert len(set(pixels)) == len(pixels) == len({v for _, v in shades})+4
    assert len(pixels)+len(lost) == len(shades)+4
    assert [x['split'] for x in got].count('val') == 2

@pytest.mark.parametrize('names', [['dog', 'cat'], ['cat', 'dog'], None])
def test_a_set_of_the_hub_keeps_its_own_class_order(tmp_path, names):
    """A folder of parquet as `datasets` writes it, classes in another order than the study's; numbers alone count
    study.classes."""
    import datasets
    images = [dict(bytes=encode_png(np.full((8, 8, 3), 10*k, np.uint8)), path=None) for k in range(6)]
    rows = dict(img=images, y=[k % 2 for k in range(6)])
    kind = datasets.ClassLabel(names=names) if names else datasets.Value('int64')
    f = datasets.Features(img=datasets.Image(), y=kind)
    datasets.Dataset.from_dict(rows, features=f).to_parquet(tmp_path/'set'/'data'/'train-00000-of-00001.parquet')
    s = spec('hub_images', repo='set', image='img', label='y', hold_out=dict(val=2))
    got = read(hub_entries(tmp_path, s), s)
    flip = names == ['dog', 'cat']
    assert all(x['label'] == (int(x['image'][0, 0, 0])//10 % 2) ^ flip for x in got)
    assert [x['split'] for x in got] == ['train']*4+['val']*2
    with pytest.raises(StudyError, match="no column 'labl'"):
        hub_entries(tmp_path, spec('hub_images', repo='set', image='img', label='labl'))
    with pytest.raises(StudyError, match='needs its commit, the key `revision`'):
        hub_entries(tmp_path, spec('hub_images', repo='no/such'))

def test_sheets_that_are_not_of_tiles(tmp_path):
    Image.new('RGB', (23, 12)).save(tmp_path/'of-cat.png')
    s = lambda **kw: spec('tiles', pattern=r'of-(?P<class>\w+)\.png', tile=10, **kw)
    assert len(tile_entries(tmp_path, s())) == 2
    with pytest.raises(StudyError, match='23 x 12 pixels are no whole number of tiles of 9 with 1 between'):
        tile_entries(tmp_path, s().model_copy(update=dict(tile=9)))
    (tmp_path/'t.csv').write_text('class,tile_row,tile_col,rmse\ncat,0,1,3\n')
    with pytest.raises(StudyError, match="t.csv: no column 'rsme' .did you mean 'rmse'"):
        tile_entries(tmp_path, s(drop='t.csv', drop_column='rsme'))
    assert len(tile_entries(tmp_path, s(drop='t.csv', drop_column='rmse', drop_below=18.))) == 1
    with pytest.raises(StudyError, match='no image matches pattern'):
        named_entries(tmp_path, 'x(?P<class>.)')

SHARED = ROOT.parent/'shared'/'data'

@pytest.mark.skipif(not (SHARED/'cifake_sd14.zip').exists(),
                    reason='the data of studies/cifar10 is not on this machine')
def test_cifake_and_cinic_are_read_as_they_are_described():
    "1,336 repeats in CIFAKE's 60,000 images; 1,515 tiles of CINIC-10 far enough from CIFAR-10."
    p = Study(ROOT/'studies'/'cifar10')
    classes, sets = p.study.classes, p.data.sets
    entries = named_entries(SHARED/'cifake_sd14.zip', sets['cifake'].pattern)
    found = translate(entries, sets['cifake'], classes, 'cifake')
    assert len(found) == 60000 and np.bincount([y for _, y, _ in found]).tolist() == [6000]*10
    assert next(y for _, y, e in found if e.name.endswith('train/FAKE/1000 (10).jpg')) == 9
    assert next(y for _, y, e in found if e.name.endswith('train/FAKE/1000.jpg')) == 0
    some, lost = [x for x in found if x[1] == 5], []
    assert len(usable(some, sets['cifake'], 32, 3, lost)) == 5521 and len(lost) == 479
    tiles = translate(tile_entries(SHARED/'cinic10_shift', sets['cinic10']), sets['cinic10'], classes, 'cinic10')
    count = np.bincount([y for _, y, _ in tiles])
    assert len(tiles) == 1515 and (count.min(), count.max()) == (143, 159)

def shard(path, members):
    with tarfile.open(path, 'w') as t:
        for name, data in members:
            i = tarfile.TarInfo(name)
            i.size = len(data)
            t.addfile(i, io.BytesIO(data))

def png(shade):
    f = io.BytesIO()
    image(shade).save(f, 'PNG')
    return f.getvalue()

def test_other_peoples_shards(tmp_path):
    shard(tmp_path/'a.tar', [('../../evil.png', png(1)), ('../../evil.cls', b'0'),
                             ('dir/b.jpg', png(2)), ('dir/b.cls', b'dog'), ('dir/b.txt', b'a dog')])
    s = list(shard_samples(tmp_path, CLASSES, 8, 3))
    assert [x['label'] for x in s] == [0, 1] and s[1]['caption'] == 'a dog'
    m = write_set(tmp_path/'sets'/'mine', s, CLASSES)
    assert not (tmp_path.parent/'evil.png').exists() and list(m.key) == ['train-0000000', 'train-0000001']
    shard(tmp_path/'a.tar', [('x.png', png(1)), ('x.cls', b'7')])
    with pytest.raises(StudyError, match="a.tar:x: class '7' is none of the study's"):
        list(shard_samples(tmp_path, CLASSES, 8, 3))
    shard(tmp_path/'a.tar', [('x.png', png(1))])
    with pytest.raises(StudyError, match="sample x has .*expected an image and 'cls'"):
        list(shard_samples(tmp_path, CLASSES, 8, 3))
    (tmp_path/'a.tar').write_bytes(b'\x1f\x8b broken')
    with pytest.raises(StudyError, match='a.tar: the shard is damaged'):
        list(shard_samples(tmp_path, CLASSES, 8, 3))

def test_a_study_without_its_data(tmp_path):
    from conftest import dump
    dump(smoke_params(), tmp_path/'params.yaml')
    with pytest.raises(StudyError, match="digits.csv.gz: the input of set 'digits' is not there; 'dvc pull'"):
        build_set(Study(tmp_path), 'digits')

@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.integers(2, 20))
@settings(max_examples=40, deadline=None)
def test_any_image_comes_to_the_study_size(w, h, channels, size):
    out = decode(encode_png(np.zeros((h, w, 3), np.uint8)), size, channels)
    assert out.shape == (size, size, channels)

@given(st.integers(0, 2**32-1))
@settings(max_examples=10, deadline=None)
def test_a_longer_rendered_corpus_begins_with_the_shorter_one(seed):
    spec = Study(smoke_study()).data.sets['rendered']
    def make(n):
        some = spec.model_copy(update=dict(splits=dict(train=n)))
        seeds = partial(derive_seed, seed)
        samples = rendered_samples(some, smoke_inputs()/'fonts', smoke_params()['study']['classes'], seeds)
        return [s['image'].tobytes()+s['caption'].encode() for s in samples]
    assert make(12)[:6] == make(6)
