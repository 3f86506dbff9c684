"Retrieved sets: each photo at its class, no copy of a test among them, the same whatever files are called, and DVC."
import copy, io, json, zipfile
from pathlib import Path
import numpy as np, pandas as pd, pytest, timm, torch
from PIL import Image
from safetensors.torch import save_file
from conftest import ROOT, copy_repo, dump, ran, sh
from synthscale import retrieved
from synthscale.curves import is_synthetic
from synthscale.data import build_set
from synthscale.params import check_study, problems, resolved
from synthscale.retrieved import class_similarity, known_images, rank_pool, retrieve_set, retrieved_counts
from synthscale.shards import encode_png, file_names, load_set, read_manifest
from synthscale.smoke import photo_params, smoke_study, write_photos
from synthscale.study import Study, StudyError, file_sha256, read_yaml

try:
    from test_backbones import LITE0, PHOTOS, SHARED
except ImportError as e:                          # the weights are a package of the extra dev
    LITE0, SHARED = None, ROOT
    PHOTOS = pytest.mark.skip(reason=f'real weights are not on this machine ({e})')

COLOURS = dict(red=(200, 60, 60), green=(60, 190, 70))

def blobs(colour, seed):
    "A soft picture in one colour, its own for each seed."
    rough = np.random.default_rng([seed, len(colour)]).normal(0, 45, (6, 6, 3))+np.array(COLOURS[colour])
    small = Image.fromarray(np.clip(rough, 0, 255).astype(np.uint8))
    return np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC))

def shifted(image):
    "The same picture further right and down."
    return np.roll(image, (9, 12), (0, 1))

def write(folder, **images):
    "Images as files, by their names without .png."
    folder.mkdir(parents=True, exist_ok=True)
    for name, a in images.items():
        (folder/f'{name}.png').write_bytes(encode_png(a))

def jpeg(image):
    "An image as a later JPEG of it."
    f = io.BytesIO()
    Image.fromarray(image).save(f, 'JPEG', quality=80)
    return np.asarray(Image.open(io.BytesIO(f.getvalue())))

def pool_of(n=6):
    "Shifted training photos of both classes, copies of each kind that may not be retrieved, and a repeat."
    photos = {f'{c}{i}': shifted(blobs(c, i)) for c in COLOURS for i in range(n)}
    return photos | dict(
        copy_of_test=blobs('red', 100), mirrored_test=blobs('green', 100)[:, ::-1], jpeg_of_val=jpeg(blobs('red', 200)),
        copy_of_training=blobs('green', 0), repeat=np.clip(photos['red0'].astype(int)+2, 0, 255).astype(np.uint8))

def make_study(folder, pool, n_per_class=6, name='own', **more):
    "A study of red and green pictures with a pool, its sets made."
    write(folder/'pool'/'some'/'where', **pool)
    for c in COLOURS:
        for split, seeds in dict(train=range(8), val=range(200, 202), test=range(100, 103)).items():
            write(folder/'photos'/split/c, **{f'{c}{i}': blobs(c, i) for i in seeds})
    torch.manual_seed(0)
    save_file(timm.create_model('test_resnet', num_classes=0).state_dict(), folder/'net.safetensors')
    p = photo_params()
    p['study']['classes'] = [*COLOURS]
    p['data']['root'] = '.'
    p['data']['sets'] |= more
    p['models']['net']['input'] = 'net.safetensors'
    p['retrieved']['nearest'] |= dict(n_per_class=n_per_class)
    dump(p, folder/'params.yaml')
    study = check_study(Study(folder))
    for s in study.data.sets:
        build_set(study, s)
    return study

def contents(m):
    "What is in a retrieved set, whatever its files were called."
    return [*zip(m.label, m.sha256, m.similarity)]

def names(m):
    "The files of rows without their folders and endings."
    return [Path(f).stem for f in file_names(m)]

@pytest.fixture(scope='module')
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp('own'), pool_of())

# ---- what is retrieved

def test_each_photo_goes_to_the_class_that_it_is_of_and_no_copy_does(study):
    m = retrieve_set(study, 'nearest')
    assert sorted(names(m)) == sorted(f'{c}{i}' for c in COLOURS for i in range(6))
    assert all(n.startswith(c) for n, c in zip(names(m), m['class']))
    assert set(m.split) == {'train'} and set(m.retrieved) == {'pool'}
    pool = read_manifest(study.set_dir('pool')).set_index('key')
    assert (pool.sha256[m.origin].to_numpy() == m.sha256.to_numpy()).all()
    left = pd.read_csv(study.path('runs', 'data', 'nearest', 'left_out.csv'))
    why = dict(zip(names(left.assign(key='')), left.reason))
    assert why == dict(copy_of_test='a copy of an image that is tested on', repeat='a repeat in the pool',
                       mirrored_test='a copy of an image that is tested on',
                       jpeg_of_val='a copy of an image that is tested on',
                       copy_of_training='a copy of a training photo')
    assert 'photos/test/red/red100.png of set photos' in set(left.like)
    recipe = json.loads((study.set_dir('nearest')/'recipe.json').read_text())
    assert recipe['left_out'] == left.reason.value_counts().to_dict() and recipe['n_pool'] == 17
    assert retrieved_counts(study, 'nearest').taken.tolist() == [6, 6]

def test_the_nearest_photo_and_its_similarity_are_what_the_features_say(study):
    m = retrieve_set(study, 'nearest')
    train = load_set(study.set_dir('photos'), 'train')
    from synthscale.backbones import backbone_features, backbone_folder, load_backbone
    net = load_backbone(backbone_folder(study, 'net'))
    a, b = (backbone_features(*net, s.images).astype(float) for s in (load_set(study.set_dir('nearest')), train))
    near = (a/np.linalg.norm(a, axis=1)[:, None])@(b/np.linalg.norm(b, axis=1)[:, None]).T
    for i, r in enumerate(m.itertuples()):
        own = near[i][train.labels == r.label]
        assert abs(np.sort(own)[-5:].mean()-r.similarity) < 1e-5
        assert train.manifest.key[train.labels == r.label].to_numpy()[own.argmax()] == r.nearest

def test_similarity_in_blocks_is_the_plain_one(monkeypatch):
    rng = np.random.default_rng(0)
    x, own, labels = rng.normal(size=(23, 7)), rng.normal(size=(11, 7)), np.arange(11) % 3
    whole = class_similarity(x, own, labels, 4)
    monkeypatch.setattr(retrieved, '_ENTRIES', 40)                       # three photos at once
    assert np.allclose(class_similarity(x, own, labels, 4), whole, atol=1e-6)
    plain = np.array([[np.sort([a@b/np.linalg.norm(a)/np.linalg.norm(b) for b in own[labels == c]])[::-1][:4].mean()
                       for c in range(3)] for a in x])
    assert np.allclose(whole, plain, atol=1e-6)
    assert np.isfinite(class_similarity(np.zeros((1, 7)), own, labels, 4)).all()

def test_names_and_order_of_the_files_change_nothing(study, tmp_path):
    first, pool = retrieve_set(study, 'nearest'), pool_of()
    order = np.random.default_rng(1).permutation(len(pool))
    other = {f'{k:02d}': list(pool.values())[i] for k, i in enumerate(order)}
    again = retrieve_set(make_study(tmp_path, other), 'nearest')
    assert contents(again) == contents(first) and list(again.origin) != list(first.origin)
    assert (load_set(study.set_dir('nearest')).images
            == load_set(Study(tmp_path).set_dir('nearest')).images).all()

def test_the_same_pool_gives_the_same_bytes(study):
    def hashes():
        retrieve_set(study, 'nearest')
        return {p.name: file_sha256(p) for p in study.set_dir('nearest').iterdir()}
    first = hashes()
    assert hashes() == first and {'manifest.parquet', 'recipe.json'} < {*first}

def test_labels_of_a_pool_are_not_read(study, tmp_path):
    "A labelled pool, all of it wrongly: the same photos at the same classes."
    first, pool = retrieve_set(study, 'nearest'), pool_of()
    for name, a in pool.items():
        write(tmp_path/'wrong'/('green' if name.startswith('red') else 'red'), **{name: a})
    s = make_study(tmp_path, {'x': blobs('red', 300)}, wrong=dict(type='imagefolder', input='wrong'), n_per_class=1)
    p = copy.deepcopy(s.raw)
    p['retrieved']['nearest'] |= dict(pool='wrong', n_per_class=6)
    assert contents(retrieve_set(check_study(Study(tmp_path, p)), 'nearest')) == contents(first)

def test_too_few_photos_are_an_error_with_the_number_of_each_class(study):
    retrieve_set(study, 'nearest')
    before = file_sha256(study.set_dir('nearest')/'manifest.parquet')
    p = copy.deepcopy(study.raw)
    p['retrieved']['nearest']['n_per_class'] = 7
    words = r'retrieved.nearest.n_per_class is 7: .*red 6, green 6 \(17 photos in the pool'
    with pytest.raises(StudyError, match=words):
        retrieve_set(Study(study.dir, p), 'nearest')
    assert before == file_sha256(study.set_dir('nearest')/'manifest.parquet')
    with pytest.raises(StudyError, match="no retrieved set 'nearst'.*did you mean 'nearest'"):
        retrieve_set(study, 'nearst')

def test_copies_are_looked_for_in_every_set_that_is_tested_on(study):
    "Splits of the other test sets count, too, and near_bits: 0 finds exact shapes alone."
    p = copy.deepcopy(study.raw)
    p['classify']['eval'] |= dict(ood_set='pool', ood_splits=['train'])
    known = known_images(Study(study.dir, p), 'nearest')['tested']
    m = read_manifest(study.set_dir('pool'))
    own = [known.nearest(k) for k in retrieved._shapes(study.set_dir('pool'), m)[:, 0]]
    assert all(found and found[1] == 0 for found in own)
    assert len(rank_pool(study, 'nearest')) == len(m)

def test_images_of_plain_tar_shards_are_read_in_place(tmp_path):
    "Shards of images of 64 pixels and more are not packed; what is retrieved from them is the same."
    s = make_study(tmp_path, pool_of())
    first = retrieve_set(s, 'nearest')
    p = copy.deepcopy(s.raw)
    p['data']['image_size'] = 64
    large = Study(tmp_path, p)
    for name in large.data.sets:
        build_set(large, name)
    assert set(read_manifest(large.set_dir('pool')).shard.str.endswith('.tar')) == {True}
    m = retrieve_set(large, 'nearest')
    assert sorted(names(m)) == sorted(names(first))
    rows = read_manifest(large.set_dir('pool')).set_index('key').loc[m.origin]
    assert rows.sha256.tolist() == m.sha256.tolist()

def test_small_images_are_compared_by_their_pixels(tmp_path):
    "Digits of 8 x 8 pixels: noisy copies of tested ones are left out, and handwriting of other people is not."
    smoke = Study(smoke_study('data'))
    tested, others = (load_set(smoke.set_dir('digits'), k).images for k in ('test', 'ood'))
    rng, n = np.random.default_rng(0), 30
    noisy = np.clip(tested[:n].astype(int)+rng.integers(-3, 4, tested[:n].shape), 0, 255).astype(np.uint8)
    write(tmp_path/'pool', **{f'copy{i}': a for i, a in enumerate(noisy)})
    write(tmp_path/'pool', **{f'own{i}': a for i, a in enumerate(others[:200])})
    torch.manual_seed(0)
    save_file(timm.create_model('test_resnet', num_classes=0).state_dict(), tmp_path/'net.safetensors')
    p = copy.deepcopy(smoke.raw)
    p['data']['sets']['pool'] = dict(type='imagefolder', input=str(tmp_path/'pool'), unlabelled=True)
    p['models']['net'] = photo_params()['models']['net'] | dict(input=str(tmp_path/'net.safetensors'))
    p['retrieved'] = dict(more=dict(pool='pool', photos='digits', backbone='net', n_per_class=1))
    p['classify']['eval']['test_splits'] = ['test']
    study = check_study(Study(smoke.dir, p))
    build_set(study, 'pool')
    ranked = rank_pool(study, 'more')
    left = ranked[ranked.reason == 'a copy of an image that is tested on']
    assert sorted(names(left)) == sorted(f'copy{i}' for i in range(n))

# ---- sets without labels

def test_an_unlabelled_set_says_so(study):
    m = read_manifest(study.set_dir('pool'))
    assert m.unlabelled.all() and len(m) == 17 and set(m.split) == {'train'} and set(m.label) == {0}
    assert 'unlabelled' not in read_manifest(study.set_dir('photos'))

def test_a_folder_without_images_is_an_error(tmp_path, study):
    p = copy.deepcopy(study.raw)
    p['data']['sets']['pool']['input'] = str(tmp_path)
    with pytest.raises(StudyError, match='no image in it'):
        build_set(Study(study.dir, p), 'pool')

def test_a_zip_of_unlabelled_photos_is_read(tmp_path, study):
    with zipfile.ZipFile(tmp_path/'pool.zip', 'w') as z:
        for i in range(3):
            z.writestr(f'a/b/{i}.png', encode_png(blobs('red', i)))
    p = copy.deepcopy(study.raw)
    p['data']['sets']['zipped'] = dict(type='imagefolder', input=str(tmp_path/'pool.zip'), unlabelled=True)
    assert len(build_set(Study(study.dir, p), 'zipped')) == 3

def wrong(study, change):
    "What is said of a changed params.yaml."
    p = copy.deepcopy(study.raw)
    change(p)
    return '\n'.join(problems(Study(study.dir, p)))

JUDGE = dict(n_images=10, recipe='convnext_digits')

@pytest.mark.parametrize('change, words', [
    (lambda p: p['classify']['curves']['nearest'].update(set='pool'), 'classify.curves.nearest.set'),
    (lambda p: p['classify']['eval'].update(ood_set='pool'), 'classify.eval.ood_set'),
    (lambda p: p.update(evaluators=dict(j=JUDGE | dict(set='pool'))), 'evaluators.j.set'),
    (lambda p: p.update(quality=dict(sets=dict(pool={}))), 'quality.sets.pool'),
    (lambda p: p.update(merged=dict(m=dict(first='photos', second='pool'))), 'merged.m.second'),
    (lambda p: p['retrieved']['nearest'].update(pool='photos', photos='pool'), 'retrieved.nearest.photos'),
])
def test_nothing_learns_from_labels_that_are_none(study, change, words):
    found = wrong(study, change)
    assert f"{words} is 'pool': expected a set with labels" in found, found

@pytest.mark.parametrize('change, words', [
    (lambda p: p['retrieved']['nearest'].update(pool='pol'), "retrieved.nearest.pool is 'pol': no such set"),
    (lambda p: p['retrieved']['nearest'].update(backbone='nett'), "did you mean 'net'?"),
    (lambda p: p['retrieved']['nearest'].update(pool='photos'), 'another set than the training photos'),
    (lambda p: p['retrieved']['nearest'].update(split='test'), "set 'pool' has no split 'test'"),
    (lambda p: p['classify']['eval'].update(ood_set='pool', ood_splits=['train']), 'that no model is validated'),
    (lambda p: p['data']['sets']['pool'].update(classes=dict(a='red')), 'data.sets.pool.classes'),
    (lambda p: p['models']['net'].update(channels=1, mean=[.5], std=[.5]), 'models.net.channels'),
    (lambda p: p['data']['sets'].update(nearest=p['data']['sets']['photos']), "'nearest' is under data.sets and"),
    (lambda p: p['retrieved']['nearest'].update(n_per_clas=3), "did you mean 'n_per_class'?"),
])
def test_what_cannot_be_is_named(study, change, words):
    found = wrong(study, change)
    assert words in found, found

def test_a_retrieved_set_is_as_real_as_its_pool(study):
    assert not is_synthetic(study, 'nearest') and 'nearest' in study.sets
    mixed = dict(real='photos', synthetic='nearest', n_real=[8], n_synthetic=[4])
    assert 'a set of synthetic images, and this is a set of real ones' in wrong(
        study, lambda p: p['classify'].update(mixtures=dict(m=mixed)))
    def drawn(p):
        p['data']['sets']['pool']['synthetic'] = True
        p['classify'].update(mixtures=dict(m=mixed))
    assert wrong(study, drawn) == ''
    assert resolved(study)['names']['sets'] == ['photos', 'pool', 'nearest']

# ---- DVC

@pytest.mark.slow
def test_dvc_retrieves_again_when_the_pool_or_the_tests_change(tmp_path):
    repo = copy_repo(tmp_path/'repo')
    write_photos(repo/'data')
    dump(photo_params(), repo/'params.yaml')
    sh('git init -q && git add -A && git commit -qm inputs', repo)
    def repro(*more):
        return ran(sh(['dvc', 'repro', *more], repo))
    after = {'results', 'laws', 'report'}
    assert repro() == {'prepare', 'data@photos', 'data@pool', 'models@net', 'retrieved@nearest', 'classify@photos',
                       'classify@nearest', *after}
    assert repro() == set()
    df = pd.read_csv(repo/'results'/'curves.csv')
    found = df[df.curve == 'nearest']
    assert set(found.train_sets) == {'nearest'} and (found.n_real == found.n_images).all() and len(found)
    first = pd.read_parquet(repo/'sets'/'nearest'/'manifest.parquet')
    tested = pd.read_parquet(repo/'sets'/'photos'/'manifest.parquet').query("split != 'train'")
    assert not {*first.sha256} & {*tested.sha256}
    note = json.loads((repo/'runs'/'costs'/'retrieved-nearest.json').read_text())
    assert note and (repo/'runs'/'retrieved'/'nearest.ipynb').exists()
    # a photo that was retrieved becomes one of the test: it is in the set no more
    taken = first.file.iloc[0]
    (repo/'data'/taken).rename(repo/'data'/'photos'/'test'/first['class'].iloc[0]/'new.png')
    assert repro('retrieved') == {'data@photos', 'data@pool', 'retrieved@nearest'}
    assert first.sha256.iloc[0] not in set(pd.read_parquet(repo/'sets'/'nearest'/'manifest.parquet').sha256)
    sh(['python', '-m', 'synthscale.run', 'check'], repo)

# ---- real photographs and real weights

@PHOTOS
@pytest.mark.slow
def test_real_weights_retrieve_real_photographs(tmp_path):
    """From 1,000 photographs of CIFAR-10 without labels, 20 labelled ones of each class find 40 each, most of which are
    of the class; copies of test photographs in the pool are left out."""
    with zipfile.ZipFile(SHARED/'cifar10_jpg.zip') as z:
        for n in z.namelist():
            if not n.endswith('.jpg'): continue
            split, label, i = *n.split('/')[-3:-1], int(Path(n).stem)
            use = 'pool' if split == 'train' and 20 <= i < 120 else f'photos/{split}/{label}' if i < 20 else ''
            if not use: continue
            copies = ['pool'] if split == 'test' and i < 2 else []
            for place in (use, *copies):
                (tmp_path/place).mkdir(parents=True, exist_ok=True)
                (tmp_path/place/f'{label}_{split}_{i}.jpg').write_bytes(z.read(n))
    p = photo_params()
    p['study'] = read_yaml(ROOT/'studies'/'cifar10'/'params.yaml')['study'] | dict(seed_names={})
    p['data'] |= dict(root='.', shard_size=1000)
    p['models'] = dict(net=LITE0 | dict(input_size=128))
    p['classify']['eval'] |= dict(validation='test', test_splits=[])
    p['retrieved']['nearest'] |= dict(n_per_class=40)
    dump(p, tmp_path/'params.yaml')
    study = check_study(Study(tmp_path))
    for s in study.data.sets:
        build_set(study, s)
    m = retrieve_set(study, 'nearest')
    assert not any('_test_' in f for f in m.file)
    right = m['class'] == m.file.str.extract(r'pool/([a-z]+)_')[0].to_numpy()
    by_class = right.groupby(m['class']).mean()
    print(f'precision {right.mean():.3f}', by_class.round(2).to_dict(), retrieved_counts(study, 'nearest').to_string())
    assert len(m) == 400 and right.mean() > .6 and by_class.min() > .3
