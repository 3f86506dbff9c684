"A study of one's own photographs: what is refused, what is set aside, and that nothing stays of what fails."
import json, shutil, zipfile, zlib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
import numpy as np, pandas as pd, pytest, timm, torch
from conftest import ROOT, edit, ran, sh
from hypothesis import given, strategies as st
from PIL import Image
from ruamel.yaml import YAML
from synthscale.backbones import fixed_size
from synthscale.data import build_set
from synthscale.decision import headline
from synthscale.drawing import model_of
from synthscale.inputs import folder_entries
from synthscale.new import (Plan, Task, class_keys, look_into, match_classes, new_task, params_text, pipeline,
                            set_aside, sizes_of)
from synthscale.params import problems
from synthscale.price import STAGE_S, seconds_per_image
from synthscale.shards import read_manifest
from synthscale.smoke import photo_tiles
from synthscale.study import Key, Study, StudyError
from pydantic import TypeAdapter

def photo(path, side=12):
    "An image of noise that its place decides."
    rng = np.random.default_rng(zlib.crc32('/'.join(path.parts[-2:]).encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)

def photos(folder, **classes):
    "A folder with so many images of each class."
    for c, n in classes.items():
        for i in range(n):
            photo(folder/c/f'{folder.name}{i}.png')
    return folder

@pytest.fixture(autouse=True, scope='module')
def measured_once():
    "The speed of training is measured once: it takes seconds, and is the same for all these studies."
    known = {}
    def measured(study, recipe):
        d = study.data
        key = repr((study.recipes[recipe].decisive, d.image_size, d.channels, len(study.study.classes)))
        if key not in known:
            known[key] = seconds_per_image(study, recipe)
        return known[key]
    with pytest.MonkeyPatch.context() as m:
        m.setattr('synthscale.price.seconds_per_image', measured)
        yield

@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "Folders of photographs and of generated images."
    d = tmp_path_factory.mktemp('own')
    photos(d/'pets', cat=24, dog=24)
    photos(d/'made', cat=30, dog=30)
    photos(d/'one', cat=24)
    photos(d/'three', cat=24, dog=3)
    photos(d/'birds', owl=9)
    photos(d/'more', cat=4, owl=4)
    photos(d/'few', a=8, b=8, c=8, d=8, e=8)
    photos(d/'uneven', cat=60, dog=12)
    for i in range(3):
        photo(d/'loose'/f'{i}.png')
    (d/'empty').mkdir()
    photos(d/'mixed'/'train', cat=9, dog=9)
    photo(d/'mixed'/'sample'/'1.png')
    photos(d/'same', cat=4, dog=4)
    shutil.copy(d/'pets'/'cat'/'pets3.png', d/'same'/'cat'/'copy.png')
    photos(d/'twin'/'made', cat=6, dog=6)
    return d

def task(here, tmp_path, **more):
    "What the command asks for."
    return replace(Task(tmp_path/'mine', here/'pets', image_size=12, minutes=60.), **more)

WRONG = [
    (lambda d: dict(images=d/'one'), 'one class'),
    (lambda d: dict(images=d/'three'), "class 'dog' has 3 usable images, expected at least 6"),
    (lambda d: dict(images=d/'loose'), '3 images beside each other'),
    (lambda d: dict(images=d/'empty'), 'no image in it'),
    (lambda d: dict(images=d/'not_there'), 'no such folder'),
    (lambda d: dict(test=d/'more'), "owl is none of the photographs' classes"),
    (lambda d: dict(ood=d/'birds'), "owl is none of the photographs' classes"),
    (lambda d: dict(candidates=[d/'birds']), "owl is none of the photographs' classes"),
    (lambda d: dict(candidates=[d/'not_there']), 'no such folder'),
    (lambda d: dict(minutes=.01), 'the cheapest plan takes'),
    (lambda d: dict(minutes=.01, seeds=1), 'the cheapest plan takes'),
    (lambda d: dict(images=d/'mixed'), 'train hold folders of classes, and sample lie beside them'),
    (lambda d: dict(candidates=[d/'pets'/'cat']), 'lies inside'),
    (lambda d: dict(test=d/'same'), '1 images to train on are also images to test or to select on'),
    (lambda d: dict(folder=d/'pets'/'mine'), 'the study would lie inside')]

@pytest.mark.parametrize('more, says', WRONG, ids=[s[:30] for _, s in WRONG])
def test_what_cannot_be_planned_is_said_and_leaves_nothing(here, tmp_path, more, says):
    with pytest.raises(StudyError, match=says):
        new_task(task(here, tmp_path, **more(here)))
    assert not list(tmp_path.iterdir())

def test_a_disk_that_is_too_small_is_said_and_leaves_nothing(here, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr('synthscale.new.shutil.disk_usage', lambda p: usage._replace(free=10**8))
    with pytest.raises(StudyError, match='0.1 GB are free on this disk, and the study needs about 0.2'):
        new_task(task(here, tmp_path))
    assert not list(tmp_path.iterdir())

PLANS = [
    (dict(candidates=['made']), dict(balance='equal', train=32, test=10, val=6)),
    (dict(images='few'), dict(balance='equal', train=20, test=10, val=10)),
    (dict(images='uneven'), dict(balance='own', train=64, test=4, val=4)),
    (dict(test='twin/made', ood='made'), dict(balance='equal', train=42, test=0, val=6))]

@pytest.mark.parametrize('more, expected', PLANS, ids=['candidates', 'five of eight', 'uneven', 'tests'])
def test_a_plan_is_a_study_that_checks(here, tmp_path, more, expected):
    "Its text is short, its price is below what was allowed, and the sets are as it says."
    more = {k: here/v if isinstance(v, str) else [here/x for x in v] for k, v in more.items()}
    study = new_task(task(here, tmp_path, **more))
    assert problems(Study(study.dir)) == [] and len((study.dir/'params.yaml').read_text().splitlines()) <= 60
    counts = read_manifest(study.set_dir('photos')).split.value_counts()
    assert {s: counts.get(s, 0) for s in ('train', 'test', 'val')} == {k: expected[k] for k in ('train', 'test', 'val')}
    assert study.classify.balance == expected['balance']
    assert pd.read_csv(study.dir/'price.csv').minutes.sum() <= 60
    made = [n for n, s in study.data.sets.items() if s.is_synthetic]
    assert made == [Path(c).name for c in more.get('candidates', [])]
    tests = dict(photos={'test', 'val'})
    if 'ood' in more:
        tests = dict(own_test={'test'}, elsewhere={'ood'}, photos={'val'})
    assert {n: {*x.locked} for n, x in study.data.sets.items() if x.locked} == tests
    for name in tests:
        build_set(study, name)

def test_damaged_and_repeated_photographs_are_counted_and_left_out(here, tmp_path):
    d = shutil.copytree(here/'pets', tmp_path/'pets')
    shutil.copy(d/'cat'/'pets0.png', d/'cat'/'again.png')
    (d/'dog'/'cut.png').write_bytes((d/'dog'/'pets0.png').read_bytes()[:60])
    study = new_task(task(here, tmp_path, images=d))
    found = pd.read_csv(study.dir/'audit.csv').query("`class` == 'all'").iloc[0]
    assert (found.damaged, found.repeats) == (1, 1)

def test_two_candidates_of_one_name_are_two_sets(here, tmp_path):
    t = task(here, tmp_path, candidates=[here/'made', here/'twin'/'made'])
    assert t.candidate_names == ['made', 'made_2'] and len(t.inputs) == 3

def test_a_class_of_other_letters_is_nobody_elses(here, tmp_path):
    "Names without a Latin letter have no key by which they could be taken for one another."
    photos(tmp_path/'a', **{'狗': 9, '鸟': 9})
    photos(tmp_path/'b', **{'狗': 9, '猫': 9})
    t = task(here, tmp_path, images=tmp_path/'a', candidates=[tmp_path/'b'])
    assert match_classes(t, class_keys(['狗', '鸟'])) == dict(b={'狗': 'class_0', '猫': None})

def test_in_somebodys_repository_nothing_of_a_failure_stays_in_the_index(here, tmp_path):
    sh('git init -q', tmp_path)
    with pytest.raises(StudyError, match='the cheapest plan takes'):
        new_task(task(here, tmp_path, minutes=.01))
    assert sh('git status --porcelain', tmp_path) == '' and [p.name for p in tmp_path.iterdir()] == ['.git']

def test_colour_in_a_single_image_is_kept(here, tmp_path):
    d = tmp_path/'grey'
    for c in 'ab':
        for i in range(12):
            photo(d/c/f'{i}.png')
            if (c, i) != ('b', 7):
                Image.open(d/c/f'{i}.png').convert('L').save(d/c/f'{i}.png')
    assert new_task(task(here, tmp_path, images=d)).data.channels == 3
    (d/'b'/'7.png').unlink()
    assert new_task(task(here, tmp_path, images=d, folder=tmp_path/'two')).data.channels == 1

def test_a_zip_is_looked_into_like_its_folder(here, tmp_path):
    with zipfile.ZipFile(tmp_path/'pets.zip', 'w') as z:
        for f in sorted((here/'pets').rglob('*.png')):
            z.write(f, f.relative_to(here/'pets').as_posix())
    a, b = look_into(tmp_path/'pets.zip'), look_into(here/'pets')
    assert (a.classes, a.splits, a.loose) == (b.classes, b.splits, b.loose)

@pytest.fixture
def locked(here, tmp_path):
    "A study whose test split is a list, and the folder of its photographs."
    d = shutil.copytree(here/'pets', tmp_path/'pets')
    return new_task(task(here, tmp_path, images=d, image_size=20)), d

def files_of(study, split):
    "The files of a split of the photographs, as the set is made now."
    m = build_set(Study(study.dir), 'photos')
    return sorted(m[m.split == split]['file'])

def resized(p):
    "Images of another size."
    p['data']['image_size'] = 8

def test_photographs_that_are_added_never_get_into_the_listed_splits(locked):
    "Copies of listed ones and what looks like them are left out; another size changes nothing."
    study, d = locked
    before = {s: files_of(study, s) for s in ('test', 'val')}
    assert [len(before[s]) for s in before] == [10, 6] and problems(study) == []
    for i in range(20):
        photo(d/'cat'/f'0{i}.png')
    first = d.parent/before['test'][0]
    shutil.copy(first, first.with_name('0copy.png'))
    like = np.array(Image.open(first))
    like[0, 0] ^= 1
    Image.fromarray(like).save(first.with_name('0like.png'))
    assert {s: files_of(study, s) for s in before} == before
    left = pd.read_csv(study.path('runs', 'data', 'photos', 'left_out.csv')).set_index('file').reason
    names = [f'{first.parent.relative_to(d.parent)}/0{k}.png' for k in ('copy', 'like')]
    says = [f'{what} {before["test"][0]} (listed for test)' for what in ('the same pixels as', 'nearly the same as')]
    assert [left[n] for n in names] == says
    edit(study.dir, resized)
    assert {s: files_of(study, s) for s in before} == before

def removed(study, file):
    "A listed photograph is gone."
    file.unlink()

def renamed(study, file):
    "A listed photograph has another name."
    file.rename(file.with_name('other.png'))

def changed(study, file):
    "A listed photograph has other bytes."
    photo(file, side=13)

def another_class(study, file):
    "The list has another class."
    t = pd.read_csv(study.path('locked', 'photos_test.csv'))
    t['class'] = t['class'].map(dict(cat='dog', dog='cat'))
    t.to_csv(study.path('locked', 'photos_test.csv'), index=False)

def no_list(study, file):
    "The list itself is gone."
    study.path('locked', 'photos_test.csv').unlink()

@pytest.mark.parametrize('harm, says', [
    (removed, '{f} is not in the input any more: put it back$'), (renamed, '{f} is not in .*other.png has its bytes'),
    (changed, '{f} has other bytes than when it was listed'), (another_class, "{f} is of class 'cat', and was listed"),
    (no_list, 'photos_test.csv: not readable as a list of images')], ids=lambda x: getattr(x, '__name__', ''))
def test_a_listed_photograph_that_is_not_as_it_was_is_named(locked, harm, says):
    study, d = locked
    first = files_of(study, 'test')[0]
    harm(study, d.parent/first)
    with pytest.raises(StudyError, match=says.format(f=first.removeprefix('pets/'))):
        build_set(study, 'photos')

def test_a_list_that_is_edited_is_another_test(locked):
    "Its hash is in params.yaml, by which DVC sees a change; `synthscale check` says so before."
    study, d = locked
    file = study.path('locked', 'photos_test.csv')
    file.write_text('\n'.join(file.read_text().splitlines()[:-1])+'\n')
    assert ['another list is another test' in x for x in problems(study)] == [True]
    with pytest.raises(StudyError, match="split 'test' has other images or classes than when it was locked"):
        build_set(study, 'photos')

def test_a_test_set_of_its_own_is_locked_by_its_files(here, tmp_path):
    "Another size is the same test; another file is not."
    d = shutil.copytree(here/'twin'/'made', tmp_path/'test')
    study = new_task(task(here, tmp_path, test=d))
    edit(study.dir, resized)
    build_set(Study(study.dir), 'own_test')
    photo(d/'cat'/'new.png')
    with pytest.raises(StudyError, match="split 'test' has other images or classes than when it was locked"):
        build_set(study, 'own_test')

def like(file, of):
    "A copy with one pixel changed."
    a = np.array(Image.open(of))
    a[0, 0] ^= 1
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(file)

def test_images_of_two_sets_that_look_alike_are_counted_and_named(here, tmp_path, capsys):
    "Generated images are like ones to test on and to train on, and photographs to train on are like ones to test on."
    pets = here/'pets'
    own = photos(tmp_path/'own', cat=6, dog=6)
    drawn = shutil.copytree(here/'made', tmp_path/'drawn')
    for c in ('cat', 'dog'):
        like(drawn/c/'copy.png', own/c/'own1.png')
    for i in range(5):                # three photographs of a class are to select on
        like(drawn/'cat'/f'learned{i}.png', pets/'cat'/f'pets{i}.png')
        like(own/'dog'/f'leak{i}.png', pets/'dog'/f'pets{i}.png')
    (own/'README.md').write_text('from a friend')
    (tmp_path/'LICENCE').write_text('free')
    study = new_task(task(here, tmp_path, test=own, candidates=[drawn]))
    whole = pd.read_csv(study.dir/'audit.csv').query("`class` == 'all'").set_index('set')
    assert whole.near_test['drawn'] == 2 and whole.near_train['drawn'] >= 2
    assert whole.near_train['drawn']+whole.near_val['drawn'] == 5
    assert 2 <= whole.near_test['photos'] == whole.near_train['own_test'] <= 5
    pairs = pd.read_csv(study.dir/'audit_copies.csv')
    two = {(f'drawn/{c}/copy.png', f'own/{c}/own1.png') for c in ('cat', 'dog')}
    assert {*zip(pairs['file'], pairs.near_file)} >= two
    said = capsys.readouterr().out
    assert 'drawn: 2 generated images look like photographs to test on, such as' in said
    assert 'photos: warning: ' in said and 'own/dog/leak' in said
    assert 'its terms may be in own/README.md, LICENCE' in said

LAYOUTS = [     # the places of each image
    'pets/{c}/{i}.png', 'a/b/{c}/{i}.png', '{c}/20{i:02}/{i}.png', '{c}/{c}/{i}.png', 'data/Train/{c}/{i}.png',
    'TRAINING/{c}/sub/{i}.png', '__MACOSX/{c}/._{i}.png {c}/{i}.png',
    '.cache/{c}/x{i}.png {c}/.ipynb_checkpoints/x{i}.png {c}/{i}.png', 'pets/x{c}{i}.png pets/{c}/{i}.png']

def laid(folder, layout, n=5):
    "Images of two classes at these places."
    for k, c in enumerate(('cat', 'dog')):
        for i in range(n):
            for j, place in enumerate(layout.split()):
                f = folder/place.format(c=c, i=i)
                f.parent.mkdir(parents=True, exist_ok=True)
                noise = np.random.default_rng((k, i, j)).integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(noise).save(f)
    return folder

def made(folder, t):
    "The set of the photographs, as params.yaml describes it before anything is set aside."
    folder.mkdir(exist_ok=True)
    classes = class_keys(list(look_into(t.images).classes))
    (folder/'params.yaml').write_text(params_text(t, Plan(classes, n_train=4, odd=match_classes(t, classes))))
    return build_set(Study(folder), 'photos')

@pytest.mark.parametrize('zipped', [False, True], ids=['folder', 'zip'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_layout_is_read_as_the_image_set_reads_it(tmp_path, layout, zipped):
    "Five images of each of two classes, wherever the folder has them; the same from a zip."
    d = laid(tmp_path/'layout', layout)
    if zipped:
        d = Path(shutil.make_archive(str(d), 'zip', d))
    found = look_into(d)
    assert found.classes == dict(cat=dict(train=5), dog=dict(train=5))
    m = made(tmp_path/'mine', Task(tmp_path/'mine', d, image_size=12))
    assert m.groupby(['class', 'split']).size().to_dict() == {('cat', 'train'): 5, ('dog', 'train'): 5}

@pytest.mark.parametrize('layout', ['{c}/train/{i}.png {c}/Test/{i}x.png', '{c}/test/{i}.png', 'x/{c}/val/{i}.png'])
def test_splits_below_classes_are_refused_by_both(tmp_path, layout):
    d = laid(tmp_path/'layout', layout)
    with pytest.raises(StudyError, match='cat has splits below it'):
        look_into(d)
    with pytest.raises(StudyError, match='expected the splits above the classes'):
        folder_entries(d/('x' if layout[0] == 'x' else ''), {'cat', 'dog'})

def test_a_class_that_is_called_like_a_split_below_a_class_belongs_to_it(tmp_path):
    "Trains among vehicles are vehicles."
    for f in ('vehicle/train/1.png', 'vehicle/bus/1.png', 'animal/cat/1.png'):
        photo(tmp_path/'d'/f)
    assert {c: n['train'] for c, n in look_into(tmp_path/'d').classes.items()} == dict(animal=1, vehicle=2)
    assert [e.label for e in folder_entries(tmp_path/'d', {'vehicle', 'animal'})] == ['animal', 'vehicle', 'vehicle']

def test_a_folder_without_images_is_said(here, tmp_path):
    d = laid(tmp_path/'d', 'all/test/{c}/{i}.png all/Train/{c}/{i}.png')
    (d/'all'/'Train'/'owl').mkdir()
    (d/'all'/'val').mkdir()
    (d/'all'/'.cache').mkdir()
    found = look_into(d)
    assert (found.splits, found.empty) == (dict(Train='train', test='test'), ['val', 'Train/owl'])

def test_candidates_of_one_class_stay_of_it(here, tmp_path):
    "A folder named like a class of the photographs is that class, not one level too much."
    for f in ('cat/a/1.png', 'cat/b/2.png'):
        photo(tmp_path/'drawn'/f)
    t = task(here, tmp_path, candidates=[tmp_path/'drawn'])
    assert t.look('drawn').classes == dict(cat=dict(train=2))
    assert match_classes(t, dict(cat='cat', dog='dog'))['drawn'] == dict(cat='cat')

@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8, unique=True))
def test_every_name_of_a_folder_becomes_a_key_of_its_own(names):
    keys = class_keys(names)
    assert len({k.lower() for k in keys.values()}) == len(names)
    for k in keys.values():
        TypeAdapter(Key).validate_python(k)

@given(st.dictionaries(st.sampled_from('abcdef'), st.integers(6, 4000), min_size=2))
def test_what_is_set_aside_leaves_most_of_every_class(counts):
    aside, least = set_aside(counts), min(counts.values())
    assert all(v >= 2 for v in aside.values()) and sum(aside.values()) <= max(least/2, 4)
    assert least-sum(aside.values()) >= 2

@given(st.integers(1, 10000), st.integers(1, 50))
def test_sizes_are_nested_multiples(n, step):
    sizes = sizes_of(n, step)
    assert sizes == sorted(set(sizes)) and all(s % step == 0 for s in sizes) and len(sizes) <= 4

def test_the_pipeline_of_a_study_outside_a_clone_names_no_place():
    text = pipeline((ROOT/'dvc.yaml').read_text())
    assert '${root}' not in text and text.count('always_changed') == 1

def test_a_class_named_like_a_word_of_yaml_stays_a_name(here, tmp_path):
    d = photos(tmp_path/'odd', **{'no': 9, 'null': 9, '1e3': 9, 'true': 9})
    study = new_task(task(here, tmp_path, images=d))
    assert sorted(study.study.classes) == ['1e3', 'no', 'null', 'true']

def shorter(p):
    "Trained for a second."
    for r in ('small', 'plain'):
        p['recipes'][r]['samples_seen_at_100'] = 640
    p['your_task']['decision']['fresh_seeds'] = 2

@pytest.mark.slow
def test_the_command_writes_a_study_that_runs(here, tmp_path):
    "A second run computes nothing but prepare."
    shutil.copytree(here/'pets', tmp_path/'pets')
    said = sh(['synthscale', 'new', 'mine', '--images', 'pets', '--candidates', str(here/'made'), '--image-size', '8',
               '--budget', '240m', '--seeds', '2'], tmp_path)
    assert 'Nothing is trained yet' in said
    edit(tmp_path/'mine', shorter)
    said = sh('dvc repro', tmp_path/'mine')
    made = ran(said)
    assert {'data@photos', 'classify@photos', 'your_task@decision', 'report'} <= made
    lock = (tmp_path/'mine'/'dvc.lock').read_text()
    assert str(ROOT) not in lock and 'site-packages' not in lock
    decided = json.loads((tmp_path/'mine'/'results'/'decision.json').read_text())
    assert decided['verdict'].upper() in said and decided['source']['set'] == 'made'
    sh('synthscale save-model decision kept', tmp_path/'mine')
    assert {p.name for p in (tmp_path/'mine'/'kept').iterdir()} == {'README.md', 'config.json', 'model.safetensors'}
    assert ran(sh('dvc repro', tmp_path/'mine')) == {'prepare'}

def test_plans_of_every_kind_are_read_back(here, tmp_path):
    t = task(here, tmp_path, candidates=[here/'made', here/'more'])
    lock = dict(photos=dict(test='0'*64))
    text = params_text(t, Plan(dict(cat='cat', dog='dog'), dict(test='locked/t.csv'), lock, 'own', 40,
                               dict(made=60, more=4), {'more': dict(cat='cat', owl=None)}))
    (tmp_path/'params.yaml').write_text(text)
    study = Study(tmp_path)
    assert study.data.sets['more'].classes == dict(cat='cat', owl=None) and study.data.sets['more'].fewer_classes
    q = study.your_task['decision']
    assert (q.candidates, q.n_more, q.recipes) == (['made', 'more'], [60], ['small', 'plain'])

def hub(answers):
    "A server that answers like the hub: path -> (status, JSON)."
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, said = answers.get(self.path.partition('?')[0], (404, {}))
            body = json.dumps(said).encode()
            self.send_response(status)
            self.send_header('Content-Type', 'application/json')
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            "Nothing is printed."
    return ThreadingHTTPServer(('127.0.0.1', 0), Handler)

@pytest.fixture
def asked(monkeypatch):
    "The hub's address leads to a server with one model, one behind a licence, and nothing else."
    weights = [dict(rfilename='unet/model.safetensors', size=3*10**9), dict(rfilename='README.md', size=5)]
    server = hub({'/api/models/a/open': (200, dict(id='a/open', sha='1'*40, siblings=weights)),
                  '/api/models/a/closed': (401, dict(error='no'))})
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    yield
    server.shutdown()
    server.server_close()

def test_the_hub_is_asked_for_the_newest_commit(asked):
    m = model_of('a/open', 'open')
    assert (m.repo, m.revision, m.size) == ('a/open', '1'*40, 3*10**9)

@pytest.mark.parametrize('given, says', [
    ('a/closed', 'accept the model.s terms on its page, and put a token of yours into HF_TOKEN'),
    ('a/none', 'a/none: not on the hub'), ('a/open@main', "'main' is no full commit hash"),
    ('a/open@', "'' is no full commit hash"), ('none', 'expected a folder that is there, or OWNER/NAME@COMMIT')])
def test_a_model_that_cannot_be_named_is_said_with_the_way_out(asked, given, says):
    with pytest.raises(StudyError, match=says):
        model_of(given, 'x')

def test_without_the_hub_a_commit_has_to_be_given(monkeypatch):
    "Nobody listens there."
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(StudyError, match='the hub cannot be asked .*name the commit, OWNER/NAME@COMMIT'):
        model_of('a/open', 'x')
    assert model_of(f'a/open@{"2"*40}', 'x').size is None

def test_models_of_the_hub_are_planned_and_their_price_is_not_known(asked, here, tmp_path, capsys):
    "Each has two prompt sets and two guidance scales; the study checks, and is short."
    study = new_task(task(here, tmp_path, models=['a/open', f'b/sd.x@{"3"*40}'], candidates=[here/'made']))
    assert problems(Study(study.dir)) == [] and len((study.dir/'params.yaml').read_text().splitlines()) <= 60
    assert study.models['open'].revision == '1'*40 and study.models['sd_x'].repo == 'b/sd.x'
    names = task(here, tmp_path, models=['a/open', f'b/sd.x@{"3"*40}']).source_names
    assert [*study.generate.sources] == names and len(names) == 8
    assert {s.guidance_scale for s in study.generate.sources.values()} == {1.5, 4.}
    assert study.generate.n_images == 4*32
    price = pd.read_csv(study.dir/'price.csv').set_index('what').minutes
    assert price.isna().sum() == 8 and price.isna()[[f'drawing {n}' for n in names]].all()
    said = capsys.readouterr().out
    assert 'models.open: a/open@111111111111 (3.0 GB) is fetched by dvc repro' in said
    assert 'models.sd_x: b/sd.x@333333333333 (of unknown size)' in said and '8 sources of 128 images' in said

@pytest.fixture(scope='module')
def drawer(tmp_path_factory):
    "A Stable Diffusion with random weights."
    from synthscale.random_pipelines import tiny_sd
    d = tiny_sd(tmp_path_factory.mktemp('drawer')/'sd')
    (d/'README.md').write_text('---\nlicense: openrail\n---\n')
    return d

@pytest.mark.slow
def test_a_model_in_a_folder_draws_candidates(here, drawer, tmp_path):
    "Its speed is measured, the study checks, and the stage generate makes as many images as were planned."
    shutil.copytree(here/'pets', tmp_path/'pets')
    said = sh(['synthscale', 'new', 'mine', '--images', 'pets', '--model', str(drawer), '--image-size', '8',
               '--budget', '120m', '--seeds', '2'], tmp_path)
    assert 'models.sd: licence openrail' in said and '4 sources of' in said
    study = Study(tmp_path/'mine')
    drawn = pd.read_csv(study.dir/'price.csv').query("what.str.startswith('drawing')").minutes
    assert len(drawn) == 4 and drawn.gt(0).all() and drawn.sum() <= 48+4*2*STAGE_S/60
    assert 'nothing is wrong' in sh('synthscale check', study.dir)
    first = next(iter(study.generate.sources))
    sh(f'dvc repro generate@{first}', study.dir)
    assert len(read_manifest(study.set_dir(first))) == study.generate.n_images

def test_a_study_with_everything_that_can_be_asked_for_is_read_at_a_glance(here, drawer, tmp_path):
    "Three models, two folders of candidates, a pool, test images from two places, a backbone: 60 lines at most."
    models = [shutil.copytree(drawer, tmp_path/f'sd{i}') for i in range(3)]
    asked = task(here, tmp_path, test=here/'twin'/'made', ood=here/'uneven', candidates=[here/'made', here/'same'],
                 models=list(map(str, models)), pool=here/'birds')
    backbone = dict(type='backbone', input='net.pth', arch='resnet18', mean=[.5]*3, std=[.5]*3, input_size=224)
    plan = Plan({'cat': 'cat', 'dog': 'dog'}, n_train=24, backbone=backbone, n_pool=9,
                lists=dict(val='locked/photos_val.csv'), made=dict(made=60, same=8))
    text = params_text(asked, plan)
    assert {*YAML(typ='safe').load(text)} >= {'retrieved', 'models', 'generate', 'your_task'}
    assert len(text.splitlines()) <= 60 and len(YAML(typ='safe').load(text)['generate']['sources']) == 12

@pytest.mark.slow
def test_drawing_that_does_not_fit_is_said(here, drawer, tmp_path):
    with pytest.raises(StudyError, match='drawing two images of each class takes'):
        new_task(task(here, tmp_path, models=[str(drawer)], minutes=.001))
    assert not list(tmp_path.iterdir())

def test_a_backbone_brings_a_probe_and_fine_tuning(here, tmp_path):
    "The probe comes first; weights that do not fit are named before anything is planned, and nothing stays."
    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path/'net.pth')
    study = new_task(task(here, tmp_path, backbone=f"{tmp_path/'net.pth'}=resnet10t", candidates=[here/'made']))
    assert problems(Study(study.dir)) == [] and len((study.dir/'params.yaml').read_text().splitlines()) <= 60
    assert study.your_task['decision'].recipes == ['probe', 'tuned', 'small', 'plain']
    assert study.classify.recipe == 'probe' and study.models['backbone'].input == '../net.pth'
    price = pd.read_csv(study.dir/'price.csv')
    assert 'features, probe' in price.what.tolist() and price.minutes.gt(0).all()
    with pytest.raises(StudyError, match='tensor .* is|holds .* tensors|do not fit the architecture'):
        new_task(task(here, tmp_path, folder=tmp_path/'other', backbone=f"{tmp_path/'net.pth'}=resnet18"))
    assert not (tmp_path/'other').exists()

FIXED = ['test_vit', 'vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224', 'vit_small_patch14_dinov2',
         'mixer_s32_224', 'maxvit_tiny_tf_224']
ANY = [('test_resnet', {}), ('tf_efficientnet_lite0', {}), ('vit_tiny_patch16_224', dict(dynamic_img_size=True))]

@pytest.mark.parametrize('arch', FIXED)
def test_an_architecture_that_takes_one_size_keeps_it(arch):
    "Transformers that have a place for each patch; a size given as a keyword is the one they take."
    own = timm.get_pretrained_cfg(arch).input_size[-1]
    assert fixed_size(arch, {}) == own and fixed_size(arch, dict(img_size=64)) == 64

@pytest.mark.parametrize('arch, kwargs', ANY, ids=['resnet', 'efficientnet', 'dynamic'])
def test_others_take_any(arch, kwargs):
    assert fixed_size(arch, kwargs) is None

def test_a_transformer_as_backbone_is_asked_at_its_own_size(here, tmp_path):
    "As it is planned, timed and priced; another size is refused before anything runs."
    torch.save(timm.create_model('test_vit').state_dict(), tmp_path/'net.pth')
    study = new_task(task(here, tmp_path, backbone=f"{tmp_path/'net.pth'}=test_vit", candidates=[here/'made']))
    assert {study.recipes[r].input_size for r in study.your_task['decision'].recipes if study.recipes[r].start} == {160}
    for key in ('recipes.probe', 'models.backbone'):
        raw = json.loads(json.dumps(study.raw))
        raw[key.split('.')[0]][key.split('.')[1]]['input_size'] = 64
        found = problems(Study(study.dir, raw))
        says = f'{key}.input_size is 64: expected 160, the only size that test_vit takes'
        assert any(says in text for text in found), found

# ---- a pool of other photos

@pytest.fixture(scope='module')
def net(tmp_path_factory):
    "A backbone of random weights, as --backbone names it."
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp('net')/'net.pth'
    torch.save(timm.create_model('test_resnet').state_dict(), file)
    return f'{file}=test_resnet'

def broken(folder):
    "Files that are called like images, and one that is none."
    folder.mkdir()
    for i in range(3):
        (folder/f'{i}.png').write_bytes(b'no image')
    (folder/'notes.txt').write_text('none')
    return folder

def single(folder):
    "One photo."
    photo(folder/'1.png')
    return folder

POOLS = [
    (lambda d, t: dict(pool=d/'more', backbone=''), 'its photos are compared .* add --backbone FILE=ARCHITECTURE'),
    (lambda d, t: dict(pool=d/'empty'), 'pool .*empty: no image in it or in any folder below'),
    (lambda d, t: dict(pool=d/'pets'), 'pets: the folder of your photographs .--images.; expected other photos'),
    (lambda d, t: dict(pool=d/'pets'/'cat'), 'cat .pool. lies inside'),
    (lambda d, t: dict(pool=d), 'pets .photos. lies inside .* .pool.'),
    (lambda d, t: dict(pool=d/'not_there'), 'not_there: no such folder'),
    (lambda d, t: dict(pool=broken(t/'broken')), "set 'pool': 3 of 3 images are damaged"),
    (lambda d, t: dict(pool=single(t/'single')), '1 usable photos, expected at least one for each of 2 classes')]

@pytest.mark.parametrize('more, says', POOLS, ids=[s[:20] for _, s in POOLS])
def test_a_pool_that_cannot_be_is_said_and_leaves_nothing(here, net, tmp_path, more, says):
    with pytest.raises(StudyError, match=says):
        new_task(task(here, tmp_path, **dict(backbone=net) | more(here, tmp_path)))
    assert not (tmp_path/'mine').exists()

def test_a_pool_is_planned_priced_and_looked_into(here, net, tmp_path, capsys):
    "Copies of tested photographs in it are counted, not refused; the stage leaves them out."
    pool = photos(tmp_path/'other', **{'': 30, 'below': 10})
    like(pool/'like.png', here/'pets'/'dog'/'pets1.png')
    shutil.copy(here/'uneven'/'cat'/'uneven1.png', pool/'generated.png')
    (pool/'cut.png').write_bytes((pool/'other1.png').read_bytes()[:60])
    own = photos(tmp_path/'own', cat=6, dog=6)
    shutil.copy(own/'cat'/'own1.png', pool/'tested.png')
    drawn = photos(tmp_path/'drawn', cat=30, dog=30)
    study = new_task(task(here, tmp_path, pool=pool, backbone=net, test=own, ood=here/'twin'/'made',
                          candidates=[here/'uneven', drawn]))
    assert problems(Study(study.dir)) == []
    spec = study.retrieved['from_pool']
    assert (spec.pool, spec.photos, spec.backbone, spec.fewer) == ('pool', 'photos', 'backbone', True)
    assert study.data.sets['pool'].unlabelled and spec.n_per_class == 43//2
    assert study.your_task['decision'].candidates == ['uneven', 'drawn', 'from_pool']
    price = pd.read_csv(study.dir/'price.csv').set_index('what')
    shown = price.images_shown['nearest photos of pool']
    assert shown == 43+len(read_manifest(study.set_dir('photos'))) and price.minutes['nearest photos of pool'] > 0
    found = pd.read_csv(study.dir/'audit.csv').query("set == 'pool'")
    assert found['class'].tolist() == ['all']
    row = found.iloc[0]
    assert (row.train, row.damaged, row.near_test) == (43, 1, 1) and row.near_train+row.near_val == 1
    said = capsys.readouterr().out
    assert 'pool: 1 photos look like photographs to test on, such as ' in said
    assert 'the stage retrieved leaves copies out' in said and 'from_pool: 21 of the 43 photos' in said

def test_the_longest_params_yaml_with_a_pool_is_still_short(asked, here, net, tmp_path):
    study = new_task(task(here, tmp_path, pool=photos(tmp_path/'other', x=40), backbone=net, ood=here/'uneven',
                          test=photos(tmp_path/'shown', cat=6, dog=6), models=['a/open', f'b/sd.x@{"3"*40}'],
                          candidates=[here/'made']))
    assert problems(Study(study.dir)) == [] and len((study.dir/'params.yaml').read_text().splitlines()) <= 60

def quick(p):
    "A probe alone, trained for seconds."
    p['your_task']['decision'] |= dict(recipes=['probe'], fresh_seeds=2, n_more=[])
    p['recipes']['probe'] |= dict(samples_seen_at_100=640, input_size=32)
    p['models']['backbone']['input_size'] = 32

@pytest.mark.slow
def test_a_pool_of_more_of_the_same_is_retrieved_and_decided_on(net, tmp_path):
    """Tiles of two photographs; the pool holds other tiles of both, and what is called generated are tiles of the wrong
    one. Nothing that is tested on comes back from the pool."""
    for c, tiles in photo_tiles().items():
        other = dict(temple='flower', flower='temple')[c]
        for i, tile in enumerate(tiles[:100]):
            places = ['pets', 'pool'] if i < 3 else ['pets'] if i < 30 else ['made'] if i < 50 else ['pool']
            for place in places:
                at = tmp_path/place/dict(pets=c, made=other, pool='')[place]
                at.mkdir(parents=True, exist_ok=True)
                Image.fromarray(tile).save(at/f'{c}{i}.png')
    said = sh(['synthscale', 'new', 'mine', '--images', 'pets', '--candidates', 'made', '--pool', 'pool', '--backbone',
               net, '--image-size', '32', '--budget', '240m', '--seeds', '1'], tmp_path)
    assert 'photos of pool are retrieved for each class' in said and 'nearest photos of pool' in said
    edit(tmp_path/'mine', quick)
    study, answered = Study(tmp_path/'mine'), sh('dvc repro your_task', tmp_path/'mine')
    made = ran(answered)
    assert {'data@pool', 'models@backbone', 'retrieved@from_pool', 'your_task@decision'} <= made
    found, photographs = (read_manifest(study.set_dir(n)) for n in ('from_pool', 'photos'))
    tested = photographs[photographs.split != 'train']
    assert set(found.split) == {'train'} and not {*found.sha256} & {*photographs.sha256} and len(tested)
    out = json.loads((study.dir/'results'/'decision.json').read_text())
    assert (out['kind'], out['source']['set'], out['source']['pool']) == ('retrieved', 'from_pool', 'pool')
    assert [c['kind'] for c in out['candidates']] == ['retrieved', 'generated']
    assert out['headline'] == headline(out['verdict'], 'retrieved') and out['headline'].upper() in answered
    assert ran(sh('dvc repro your_task', study.dir)) == {'prepare'}
