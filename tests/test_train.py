"The trainer: killed runs, many processes, images that stay on disk, and what stops a run."
import json, pickle, shutil, signal, subprocess, sys, time
from dataclasses import replace
from importlib.metadata import version
import numpy as np, pandas as pd, pytest, torch
from conftest import ROOT, WAIT, dump, environment, load
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from synthscale.classify import bring_points, check_curve, find_point, point_config, run_curve, run_points, version_note
from synthscale.curves import Point, curve_points
from synthscale.study_curves import curve_of
from synthscale.evaluators import build_evaluator
from synthscale.loop import Loop
from synthscale.params import check_study
from synthscale.recipes import METRICS, Recipe
from synthscale.shards import (balanced_order, encode_png, join, load_set, open_images, read_manifest, write_manifest,
                               write_shard)
from synthscale.smoke import run_smoke, smoke_inputs, smoke_params
from synthscale.study import Study, StudyError, file_sha256
from synthscale.train import (Mix, NotFinite, StreamDataset, _posterize, create_net, index_stream, logits, measure,
                              timm_transform, train_and_measure, train_net)

torch.set_num_threads(1)
VIT = dict(name='vit_tiny_patch16_224',
           kwargs=dict(img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2, drop_path_rate=.1,
                       class_token=False, global_pool='avg'))
WHOLE_PATHS = VIT | dict(kwargs=VIT['kwargs'] | dict(drop_path_rate=0.))
RICH = dict(reference='a test', arch=VIT, samples_seen_at_100=6400, samples_seen_power=0., batch_size=32,
            optimizer=dict(name='adamw', lr=2e-3, weight_decay=.05, clip=1.), label_smoothing=.1, ema=.98,
            augment=dict(affine=.5, flip=True, crop=1, mixup=.2, cutmix=.5))

def recipe(**kw):
    return Recipe.model_validate(RICH | kw)

def noise(rng, *shape):
    "Random images."
    return rng.integers(0, 256, shape).astype(np.uint8)

# ---- killed and resumed

TRAIN = """
import numpy as np, sys, torch
from safetensors.torch import save_file
from synthscale.recipes import Recipe
from synthscale.train import create_net, train_net
import json
torch.set_num_threads(1)
r = Recipe.model_validate(json.loads(sys.argv[1]))
x = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1)).astype(np.uint8); y = np.arange(64) % 4
net = train_net(create_net(r.arch, 4, 1, 0), x, y, r, r.samples_seen(64), 5, state='state.safetensors', every=.2)
save_file(net.state_dict(), 'done.safetensors')
"""

@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_weights(tmp_path):
    "SIGKILL at random moments; dropped paths, mixing, averaged weights and all."
    spec = json.dumps(RICH | dict(samples_seen_at_100=25600))
    def start(d):
        d.mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, '-c', TRAIN, spec], cwd=d, stderr=subprocess.DEVNULL,
                                env=environment() | {'PYTHONPATH': str(ROOT)})
    assert start(tmp_path/'whole').wait(300) == 0
    rng, kills, d = np.random.default_rng(0), 0, tmp_path/'killed'
    def stamp():
        return (d/'state.safetensors').stat().st_mtime_ns if (d/'state.safetensors').exists() else 0
    for _ in range(4):
        before = stamp()
        p = start(d)
        while stamp() == before and p.poll() is None:
            time.sleep(.02)
        time.sleep(rng.uniform(0, .3))
        if p.poll() is not None: continue
        p.send_signal(signal.SIGKILL)
        p.wait()
        kills += 1
    assert start(d).wait(300) == 0 and kills >= 2
    a, b = (load_file(tmp_path/k/'done.safetensors') for k in ('whole', 'killed'))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_a_state_of_another_network_is_refused(tmp_path):
    x, y = np.zeros((32, 8, 8, 1), np.uint8), np.arange(32) % 2
    r = recipe(samples_seen_at_100=64)
    train_net(create_net(r.arch, 2, 1, 0), x, y, r, 64, 0, state=tmp_path/'s', every=0.)
    wide = recipe(arch=VIT | dict(kwargs=VIT['kwargs'] | dict(embed_dim=64)))
    with pytest.raises(StudyError, match='state of another network'):
        train_net(create_net(wide.arch, 2, 1, 0), x, y, wide, 64, 0, state=tmp_path/'s')

# ---- one process or two

TWO = """
import json, sys, numpy as np, torch
import synthscale.train as t
from synthscale.recipes import Recipe
torch.set_num_threads(1)
r, out = Recipe.model_validate(json.loads(sys.argv[1])), sys.argv[2]
x = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1)).astype(np.uint8); y = np.arange(64) % 4
seen, real = [], t.losses
def losses(*a):
    l = real(*a)
    seen.append(l.detach().mean())
    return l
t.losses = losses
acc = t.accelerator(r, cpu=True)
net = t.train_net(t.create_net(r.arch, 4, 1, 0), x, y, r, r.samples_seen(64), 5, acc=acc)
per_step = acc.reduce(torch.stack(seen), 'mean')
w = float(sum(p.abs().sum() for p in net.parameters()))
if acc.is_main_process:
    json.dump(dict(losses=per_step.tolist(), n=acc.num_processes, w=w), open(out, 'w'))
"""

@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path):
    "torchrun with gloo, the same global batch, no batch norm: equal but for rounding, 1e-4 of the loss over 60 steps."
    plain = RICH | dict(samples_seen_at_100=32*60, arch=WHOLE_PATHS, augment=dict(affine=.5, flip=True, crop=1),
                        optimizer=dict(name='sgd', lr=.05, weight_decay=1e-3, kwargs=dict(momentum=.9), clip=1.))
    (tmp_path/'two.py').write_text(TWO)
    got, env = {}, environment() | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    for n in (1, 2):
        launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'] if n == 2 else []
        r = subprocess.run([sys.executable, *launch, 'two.py', json.dumps(plain), f'{n}.json'], cwd=tmp_path, env=env,
                           capture_output=True, text=True, timeout=WAIT)
        assert r.returncode == 0, r.stderr[-3000:]
        got[n] = json.loads((tmp_path/f'{n}.json').read_text())
    assert (got[1]['n'], got[2]['n']) == (1, 2) and len(got[1]['losses']) == 60
    a, b = np.array(got[1]['losses']), np.array(got[2]['losses'])
    assert np.abs(a/b-1).max() < 1e-4 and a[-10:].mean() < a[:10].mean()
    assert got[1]['w'] == pytest.approx(got[2]['w'], rel=1e-5)

# ---- what is shown

kinds_of_images = st.lists(st.tuples(st.integers(1, 20), st.floats(.02, 1.)), min_size=1, max_size=4)

@given(kinds_of_images, st.integers(4, 24), st.integers(1, 20), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_every_batch_holds_its_share_of_each_kind(kinds, batch, steps, seed):
    counts, raw = zip(*kinds)
    mix = Mix(counts, tuple(r/sum(raw) for r in raw))
    s = index_stream(sum(counts), steps, batch, torch.Generator().manual_seed(seed), mix)
    want, edges = mix.of_batch(batch), np.cumsum([0, *counts])
    assert s.shape == (steps, batch) and sum(want) == batch and min(want) >= 1
    for lo, hi, k, share in zip(edges, edges[1:], want, mix.shares):
        here = (s >= lo) & (s < hi)
        assert (here.sum(1) == k).all()
        assert abs(k-share*batch) < 1 or k == 1 or 1 in want            # rounding, but for kinds that would be left out
        c = torch.bincount(s[here]-lo, minlength=hi-lo)
        assert c.max()-c.min() <= 1             # every image of a kind as often as any other, but for the last pass

@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_by_count_every_image_is_shown_as_often(n, steps, batch, seed):
    c = torch.bincount(index_stream(n, steps, batch, torch.Generator().manual_seed(seed)).flatten(), minlength=n)
    assert c.max()-c.min() <= 1

def test_a_weight_of_nearly_nothing_is_training_without():
    "Synthetic images whose loss hardly counts change what a network learns from real images by next to nothing."
    r = recipe(batch_size=16, augment={}, ema=0., arch=WHOLE_PATHS, optimizer=dict(name='sgd', lr=.1, weight_decay=0.))
    x, y = noise(np.random.default_rng(0), 40, 8, 8, 1), np.arange(40) % 2
    wrong = np.r_[y[:20], 1-y[20:]]
    def apart(*weights):
        mix = Mix((20, 20), (.5, .5), *weights)
        nets = [train_net(create_net(r.arch, 2, 1, 0), x, labels, r, 320, 1, mix, 2) for labels in (y, wrong)]
        return (logits(nets[0], x)-logits(nets[1], x)).abs().max()
    assert apart((1., 1e-9)) < 1e-5
    assert apart() > 1e-2

class OnDisk:
    "Images in files, read one by one."
    def __init__(self, folder, images):
        self.files = [folder/f'{i}.npy' for i in range(len(images))]
        for f, a in zip(self.files, images):
            np.save(f, a)
    def __len__(self):
        return len(self.files)
    def __getitem__(self, i):
        return np.load(self.files[i]) if isinstance(i, int) else np.stack([np.load(f) for f in self.files[i]])

def test_images_on_disk_train_as_images_in_memory_do(tmp_path):
    "The same stream, read by two decoding processes."
    rng = np.random.default_rng(0)
    x, y = noise(rng, 50, 12, 12, 3), np.arange(50) % 2
    r = recipe(samples_seen_at_100=320, input_size=8)
    a, b = (train_net(create_net(r.arch, 2, 3, 0), images, y, r, 320, 3) for images in (x, OnDisk(tmp_path, x)))
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert (logits(a, x, size=8)-logits(a, OnDisk(tmp_path, x), 16, size=8)).abs().max() < 1e-5

@pytest.mark.parametrize('policy, channels', [
    ('rand-m9-mstd0.5-inc1', 3), ('rand-m10-mstd0.5-inc1', 3), ('rand-m10-mstd0.5-inc1', 1), ('original', 3), ('v0', 3),
    ('augmix-m5', 3)])
def test_every_image_can_be_posterized_and_is_as_it_was_before_pillow_13(monkeypatch, policy, channels):
    "timm asks for 0 bits at its largest magnitude, which Pillow refuses from 13 on and took as black before."
    x = noise(np.random.default_rng(0), 50, 12, 12, channels)
    kwargs, half = dict(auto_augment=policy, scale=(.5, 1.)), (.5,)*channels
    plain = create_transform((channels, 12, 12), is_training=True, hflip=0., color_jitter=None, mean=half, std=half,
                             **kwargs)
    r = recipe(augment=dict(transform=dict(auto_augment=policy, scale=[.5, 1.])))
    ours = pickle.loads(pickle.dumps(timm_transform(r, 12, channels)))          # as a decoding process may get it
    images = [StreamDataset(x, np.arange(400) % 50, t, 1) for t in (ours, plain)]
    new = [images[0][k] for k in range(400)]
    def as_before(image, bits):
        return image.point([i & ~(2**(8-bits)-1) for i in range(256)]*len(image.getbands()))
    monkeypatch.setattr('PIL.ImageOps.posterize', as_before)
    assert all(torch.equal(new[k], images[1][k]) for k in range(400))

def test_posterizing_keeps_the_bits_it_is_asked_for():
    a = noise(np.random.default_rng(0), 1, 8, 8, 3)[0]
    got = [np.asarray(_posterize(Image.fromarray(a), bits)) for bits in range(9)]
    assert all((got[bits] == a & (256-2**(8-bits))).all() for bits in range(9)) and not got[0].any()

# ---- what stops a run, and what is kept of it

def test_a_loss_that_is_not_finite_names_its_step_and_its_images():
    x, y = noise(np.random.default_rng(0), 40, 8, 8, 1), np.arange(40) % 2
    r = recipe(optimizer=dict(name='sgd', lr=1e30, weight_decay=0.), ema=0.)
    with pytest.raises(NotFinite, match=r'not finite at step \d+ of 200') as e:
        train_net(create_net(r.arch, 2, 1, 0), x, y, r, 6400, 0)
    assert 0 < e.value.step < 51 and len(e.value.positions) == 32 and max(e.value.positions) < 40

def test_checkpoints_keep_the_best_and_the_last_weights_and_survive_a_stop(tmp_path):
    rng = np.random.default_rng(0)
    x, y = noise(rng, 96, 8, 8, 1), np.arange(96) % 4
    x[np.arange(96), y] = 255
    r, val, test = recipe(samples_seen_at_100=1920), (x[64:80], y[64:80]), (x[80:], y[80:])
    got = train_and_measure(x[:64], y[:64], dict(val=val, test=test), r, 4, 1920, 0, checkpoints=4, folder=tmp_path)
    seen = json.loads((tmp_path/'validation.json').read_text())
    assert list(seen) == ['15', '30', '45', '60'] and got['val']['loss'] == pytest.approx(seen['60'])
    net = create_net(r.arch, 4, 1, 9)
    for name, loss in (('last', seen['60']), ('best', min(seen.values()))):
        net.load_state_dict(load_file(tmp_path/f'{name}.safetensors'))
        assert measure(logits(net, val[0]), val[1], 4)['loss'] == pytest.approx(loss)

def test_bf16_trains_nearly_as_float32_does_and_is_measured_in_float32():
    rng = np.random.default_rng(0)
    x, y = noise(rng, 64, 8, 8, 1), np.arange(64) % 2
    x[y == 1, :, :2] = 255
    recipes = [recipe(samples_seen_at_100=1920, precision=p) for p in ('no', 'bf16')]
    nets = [train_net(create_net(r.arch, 2, 1, 0), x, y, r, 1920, 0) for r in recipes]
    outs = [logits(n, x) for n in nets]
    assert all(o.dtype == torch.float32 for o in outs) and not torch.equal(*outs) and (outs[0]-outs[1]).abs().max() < .5
    assert all((o.argmax(1).numpy() == y).mean() > .95 for o in outs)
    assert torch.equal(nets[1](torch.zeros(1, 1, 8, 8)), nets[1].float()(torch.zeros(1, 1, 8, 8)))

# ---- measuring

@given(st.integers(2, 30), st.integers(2, 8), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_measures_agree_with_scikit_learn_and_are_bounded(n, k, seed):
    from sklearn.metrics import accuracy_score, log_loss
    rng = np.random.default_rng(seed)
    out, y = torch.tensor(rng.normal(0, 3, (n, k))), rng.integers(0, k, n)
    m = measure(out, y, k)
    p = torch.softmax(out, 1).numpy()
    assert m['loss'] == pytest.approx(log_loss(y, p, labels=range(k)), rel=1e-6)
    assert m['top1'] == pytest.approx(accuracy_score(y, p.argmax(1)))
    assert m['top1'] <= m['top5'] <= 1 and 0 <= m['ece'] <= 1
    w = measure(out, y, k, within=True)
    assert w['loss'] <= m['loss']+1e-9 and w['top1'] >= m['top1']            # fewer rivals
    perm = rng.permutation(n)
    again = measure(out[perm], y[perm], k)
    assert all(again[q] == pytest.approx(m[q]) for q in METRICS)

WRONG = [(dict(optimizer=dict(name='adamwx', lr=.1, weight_decay=0.)), "optimizer 'adamwx'"),
         (dict(arch=dict(name='resnet18x')), 'no such model'),
         (dict(augment=dict(transform=dict(scale=[.1, 1.], nonsense=1))), 'create_transform does not take it'),
         (dict(input_size=64), 'input_size is 64')]

@pytest.mark.parametrize('change, words', WRONG)
def test_what_a_recipe_cannot_be_is_said(change, words):
    x, y = np.zeros((32, 8, 8, 1), np.uint8), np.arange(32) % 2
    r = recipe(**change)
    with pytest.raises(StudyError, match=words):
        train_net(create_net(r.arch, 2, 1, 0), x, y, r, 64, 0)

# ---- in a study

POINT = Point('convnext_digits', 'digits', 'rendered', 20, 20, 0)

def study_in(folder, change=lambda p: None):
    "The smoke study with its image sets made."
    p = smoke_params()
    p['models'], p['generate']['sources'], p['filters'], p['merged'], p['quality']['sets'] = {}, {}, {}, {}, {}
    p['classify']['mixtures'], p['laws'], p['report'] = {}, {}, {}
    change(p)
    folder.mkdir(parents=True, exist_ok=True)
    dump(p, folder/'params.yaml')
    (folder/'data').symlink_to(smoke_inputs())
    s = check_study(Study(folder))
    run_smoke(s, ('data',))
    return s

@pytest.fixture
def study(tmp_path):
    return study_in(tmp_path/'study')

@pytest.mark.slow
def test_points_trained_under_torchrun_or_in_an_array_are_found_by_the_stage(study):
    env = environment() | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    def go(*cmd):
        cmd = [sys.executable, *cmd]
        return subprocess.run(cmd, cwd=study.dir, env=env, capture_output=True, text=True, timeout=WAIT)
    train = ['-m', 'synthscale.run', 'train']
    r = go('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', *train, 'digits', '--points', '0:2')
    assert r.returncode == 0, r.stderr[-3000:]
    r = go(*train, 'digits', '--points', '2:', '--workers', '1')
    assert r.returncode == 0 and 'are trained' in r.stdout, r.stderr[-3000:]
    points = curve_points(curve_of(study, 'digits'), study.classify.compute_seeds)
    done = run_points(study, points, workers=1)
    assert all(d.get('cached') for d in done.values())
    assert len(list(study.path('build', 'points').glob('*/*.json'))) == len(done)
    r = go(*train, 'digits', '--points', 'nonsense')
    assert 'expected a:b' in r.stderr and r.returncode == 1
    assert "did you mean 'digits'" in go(*train, 'digist').stderr

def test_the_key_of_a_point_is_its_images_labels_recipe_and_engine_and_nothing_else(study, monkeypatch):
    "Not the code, no version, no name: whatever cannot change its numbers leaves a finished point where it is."
    def config(change=lambda p: None, point=POINT):
        p = load(study.dir/'params.yaml')
        change(p)
        return point_config(Study(study.dir, p), point)
    first = config()
    assert set(first) == {'engine', 'images', 'n_images', 'tests', 'within', 'classes', 'recipe', 'mix', 'samples_seen',
                          'seed', 'checkpoints'}
    def renamed(p):
        p['recipes'][POINT.recipe]['reference'] = 'elsewhere'
        p['study']['name'] = 'other'
        p['classify'].update(seeds=9, compute_tolerance=.5)
        p['classify']['curves'] = {'another': p['classify']['curves']['digits']}
    assert config(renamed) == first
    def recipe_of(p):
        return p['recipes'][POINT.recipe]
    others = [config(lambda p: recipe_of(p)['optimizer'].update(lr=.004)), config(lambda p: p['study'].update(seed=1)),
              config(lambda p: p['study']['classes'].reverse()), config(lambda p: p['classify'].update(checkpoints=2)),
              config(lambda p: p['classify']['eval'].update(within=['ood'])),
              *(config(point=replace(POINT, **k)) for k in (dict(seed=1), dict(n_real=30), dict(train_multiplier=2),
                                                            dict(synthetic_weight=.5)))]
    for name, splits in (('digits', ('train', 'test')), ('rendered', ('train',))):
        d = study.set_dir(name)
        whole = read_manifest(d)
        def edited(column, row, value):
            "The key after one row of the manifest is another."
            m = whole.copy()
            m.loc[row, column] = value
            m['class'] = [study.study.classes[i] for i in m.label]
            write_manifest(d, m)
            return config()
        for split in splits:
            used = whole[whole.split == split]
            if split == 'train':
                seed = study.seed('order', name, POINT.seed)
                order = balanced_order(used.label, seed)
                used, unused = used.iloc[order[:20]], used.iloc[order[20:]]
                assert edited('sha256', unused.index[0], 'another image') == first
            row = used.index[0]
            others.append(edited('sha256', row, 'another image'))
            others.append(edited('label', row, (used.label[row]+1) % 10))
        write_manifest(d, whole)
    assert config() == first
    monkeypatch.setattr('synthscale.classify.ENGINE', 99)
    every = [first, config(), *others]
    assert len({json.dumps(c, sort_keys=True) for c in every}) == len(every) == 17

def test_points_come_back_from_what_dvc_keeps_and_versions_are_said(study, monkeypatch, capsys):
    points = curve_points(curve_of(study, 'digits'), study.classify.compute_seeds)
    run_points(study, points[:2], workers=1)
    some = run_points(study, points[:3], workers=1)                                          # two found, one trained
    here = {k: version(k) for k in ('torch', 'timm', 'numpy')}
    assert all(r['made']['versions'] == here and r['made']['cpu_s'] > 0 for r in some.values())
    assert version_note('digits', some) == ''
    monkeypatch.setattr('synthscale.classify.versions', lambda: here | {'torch': '99'})      # upgraded in the middle
    whole = run_curve(study, 'digits', workers=1)
    said = capsys.readouterr().out
    assert "curve 'digits' mixes points of several library versions" in said
    groups = dict(g.split(' with ') for g in said.strip().split(': ')[1].split('; '))
    assert set(groups) == {'3', str(len(points)-3)} and f"torch {here['torch']}" in groups['3'].split(', ')
    assert 'torch 99' in groups[str(len(points)-3)].split(', ')
    kept, out = study.path('runs', 'classify', 'digits'), study.path('build', 'points')
    tables = {f.name: f.read_bytes() for f in kept.iterdir()}
    assert len(tables['points.jsonl'].splitlines()) == len(points)
    monkeypatch.setattr('synthscale.train.train_and_measure', None)                  # nothing is trained any more
    shutil.rmtree(out)
    assert run_curve(study, 'digits', workers=1).equals(whole)
    assert {f.name: f.read_bytes() for f in kept.iterdir()} == tables

# ---- damaged records and states

def damaged_records(good):
    "What disks, people and other programs make of a record: name -> bytes."
    record = json.loads(good)
    def edited(change):
        r = json.loads(good)
        change(r)
        return json.dumps(r, sort_keys=True).encode()
    half = len(good)//2
    return {
        'cut': good[:-20], 'empty': b'', 'half': good[:half], 'zeros': bytes(len(good)),
        'a flipped bit': good[:half]+bytes([good[half] ^ 1])+good[half+1:],
        'not UTF-8': b'\xff'+good, 'a list': json.dumps([record]).encode(), 'null': b'null',
        'twice': good+good, 'a smaller loss': edited(lambda r: r['tests']['test'].update(loss=.001)),
        'no tests': edited(lambda r: r.pop('tests')), 'no hash': edited(lambda r: r.pop('sha256')),
        'another seed': edited(lambda r: r['config'].update(seed=1)),
        'other versions': edited(lambda r: r.update(made={})),
        'not a number': edited(lambda r: r['tests']['test'].update(loss=float('nan')))}

def test_a_damaged_record_is_never_believed_and_its_point_is_trained_again(study, capsys):
    point = curve_points(curve_of(study, 'digits'), study.classify.compute_seeds)[0]
    first = run_points(study, [point], workers=1)[point]
    config = point_config(study, point)
    [file] = study.path('build', 'points').glob('*/*.json')
    good, kept = file.read_bytes(), study.path('runs', 'classify', 'digits', 'points.jsonl')
    kept.parent.mkdir(parents=True)
    for name, bad in damaged_records(good).items():
        file.write_bytes(bad)
        assert find_point(study, config) is None, name
        assert f'{file}: damaged, so the point is trained again' in capsys.readouterr().err, name
        kept.write_bytes(bad.replace(b'\n', b' ')+b'\n')
        assert bring_points(study, 'digits') == 0 and find_point(study, config) is None, name
        assert bad == b'' or f'{kept}: damaged in line 1' in capsys.readouterr().err, name
        kept.write_bytes(good+b'\n')                              # a good line takes the place of a damaged file
        assert bring_points(study, 'digits') == 1 and find_point(study, config)['tests'] == first['tests'], name
    kept.unlink()
    file.write_bytes(good[:-20])
    again = run_points(study, [point], workers=1)[point]
    assert 'cached' not in again and again['tests'] == first['tests']

@pytest.mark.parametrize('damage', ['cut', 'empty', 'half', 'no hash', 'zeros', 'a pickle', 'a weight', 'a moment',
                                    'the step'])
def test_a_damaged_state_is_not_trained_on(tmp_path, capsys, damage):
    "The run begins again and ends with the weights of one that was never killed."
    def network():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(.5), torch.nn.Linear(4, 1))
        return net, torch.optim.AdamW(net.parameters(), lr=.1)
    def trained(state=None, steps=6):
        net, opt = network()
        def step(i, generator):
            loss = net(torch.randn(8, 3, generator=generator)).square().mean()
            loss.backward()
            return loss
        loop = Loop(net, opt, steps, lambda i: .1, seed=1, state=state, every=0.)
        start = loop.start
        return start, loop.run(step)
    state = tmp_path/'state.safetensors'
    _, want = trained()
    trained(state, steps=4)
    good = state.read_bytes()
    end = 8+int.from_bytes(good[:8], 'little')
    header = json.loads(good[8:end])
    def at(name):
        i = end+header[name]['data_offsets'][0]
        return good[:i]+bytes([good[i] ^ 64])+good[i+1:]
    bad = {'cut': good[:-3], 'empty': b'', 'half': good[:len(good)//2], 'zeros': bytes(len(good)),
           'no hash': good.replace(b'"sha256"', b'"sha255"'), 'a pickle': pickle.dumps({}),
           'a weight': at('net.0.weight'), 'a moment': at('opt.state.0.exp_avg'),
           'the step': good.replace(b'"step":"4"', b'"step":"3"')}[damage]
    assert bad != good
    state.write_bytes(bad)
    start, net = trained(state)
    assert start == 0 and 'a damaged state, so the training begins again' in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), want.state_dict().values()))
    state.write_bytes(good)
    start, net = trained(state)
    assert start == 4 and all(torch.equal(a, b) for a, b in zip(net.parameters(), want.parameters()))

def test_an_evaluator_that_was_made_is_left_alone(study, monkeypatch):
    name, out = 'real_classifier', study.path('evaluators', 'real_classifier')
    card = build_evaluator(study, name)
    made = {f.name: f.read_bytes() for f in out.iterdir()}
    class Trained(Exception):
        pass
    def train(*a, **k):
        raise Trained
    monkeypatch.setattr('synthscale.train.train_net', train)
    def again(change=lambda p: None):
        p = load(study.dir/'params.yaml')
        change(p)
        return build_evaluator(Study(study.dir, p), name)
    def recipe_of(p):
        return p['recipes'][p['evaluators'][name]['recipe']]
    assert again().equals(card) and again(lambda p: recipe_of(p).update(reference='elsewhere')).equals(card)
    for change in (lambda p: recipe_of(p)['optimizer'].update(lr=.004), lambda p: p['study'].update(seed=1),
                   lambda p: p['evaluators'][name].update(n_images=190)):
        with pytest.raises(Trained):
            again(change)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == made
    weights = out/'model.safetensors'
    weights.write_bytes(made[weights.name][:-1])                     # damaged: no longer what was noted
    with pytest.raises(Trained):
        again()
    weights.write_bytes(made[weights.name])
    assert again().equals(card)
    monkeypatch.setattr('synthscale.evaluators.ENGINE', 99)
    with pytest.raises(Trained):
        again()

def test_a_point_whose_loss_is_not_finite_names_step_and_images_and_the_others_go_on(study):
    p = load(study.dir/'params.yaml')
    optimizer = dict(name='sgd', lr=1.0e+30, weight_decay=0.)
    p['recipes']['wild'] = p['recipes']['convnext_digits'] | dict(optimizer=optimizer)
    s = Study(study.dir, p)
    dump(p, study.dir/'params.yaml')
    good, bad = (Point(name, 'digits', 'digits', 20, 0, 0) for name in ('convnext_digits', 'wild'))
    words = (r"1 of 2 points failed, the others are kept.*not finite at step \d+ of \d+ "
             r"\(images digits:train-.*recipes.wild.optimizer.lr")
    with pytest.raises(StudyError, match=words):
        run_points(s, [bad, good], workers=1)
    assert run_points(s, [good], workers=1)[good]['cached']

def test_what_the_sets_cannot_give_is_found_before_anything_is_trained(study):
    "A training image of one set that is a test image of another; a class that a set lacks; more images than there are."
    d, tests = study.set_dir('rendered'), read_manifest(study.set_dir('digits'))
    whole = read_manifest(d)
    def message(rows, column, value):
        m = whole.copy()
        m.loc[rows, column] = value
        m['key'] = m.split+'-'+m.key.str.rpartition('-')[2]
        write_manifest(d, m)
        with pytest.raises(StudyError) as e:
            check_curve(study, 'rendered')
        return str(e.value)
    first, tested = whole.index[whole.split == 'train'][0], tests[tests.split == 'ood'].sha256.iloc[0]
    said = message(first, 'sha256', tested)
    assert "set 'rendered': 1 training images are also test images, e.g. train-0000000" in said
    said = message(whole.label == 3, 'split', 'spare')
    assert 'images of class 3: a class-balanced subset of 80 needs 8 (largest possible: 0;' in said
    said = message(whole.index[60:], 'split', 'spare')
    assert "curve 'rendered', synthetic images: set 'rendered' has 60 images, 80 were asked for" in said

@pytest.mark.parametrize('where', [dict(ood_set='rendered', ood_splits=['held_out']),
                                   dict(in_domain_set='rendered', in_domain_splits=['held_out'])], ids=['ood', 'in'])
def test_another_set_of_tests_and_classes_that_compete_alone(tmp_path, where):
    "Handwriting is validated on, rendered digits are one more test: out of distribution, or in domain."
    def change(p):
        p['classify']['eval'] |= where | dict(within=['held_out'])
    s = study_in(tmp_path/'study', change)
    df = run_curve(s, 'digits', workers=1)
    assert set(df.test_set) == {'val', 'test', 'ood', 'held_out'} and set(df.metric) == set(METRICS)
    top1 = df[df.metric == 'top1']
    assert (top1.stderr-np.sqrt(top1.value*(1-top1.value)/top1.n_test)).abs().max() < 1e-9
    assert df[df.metric == 'ece'].stderr.isna().all() and df[df.metric != 'ece'].stderr.notna().all()
    assert df.samples_seen.notna().all()

def test_checkpoints_of_a_point_are_kept(tmp_path):
    s = study_in(tmp_path/'study', lambda p: p['classify'].update(checkpoints=3))
    p = curve_points(curve_of(s, 'digits'))[0]
    record = run_points(s, [p], workers=1)[p]
    kept = {f.name for f in s.path('build', 'weights', record['key']).iterdir()}
    assert kept == {'best.safetensors', 'last.safetensors', 'validation.json'}

def test_weights_and_shares_reach_the_trainer_and_the_key(study):
    "By count, by share, and with a weight are three different points; without a second kind all are the same one."
    def at(**kw):
        return Point('convnext_digits', 'digits', 'rendered', 20, 40, 0, **kw)
    points = [at(), at(real_share=.5), at(synthetic_weight=.25), at(real_share=.5, synthetic_weight=.25)]
    done = run_points(study, points, workers=1)
    assert len({r['key'] for r in done.values()}) == 4
    assert len({r['tests']['test']['loss'] for r in done.values()}) == 4

def test_images_in_shards_train_as_images_in_memory_do(tmp_path):
    "The same stream, read from plain tars by two decoding processes."
    rng = np.random.default_rng(0)
    x, y = noise(rng, 50, 12, 12, 3), np.arange(50) % 2
    for k in range(2):
        samples = [dict(key=f'{i:04d}', image=encode_png(x[i]), label=int(y[i]), caption='')
                   for i in range(25*k, 25*k+25)]
        write_shard(tmp_path/f's-{k:06d}.tar', samples)
    rows = pd.DataFrame(dict(key=[f'{i:04d}' for i in range(50)], shard=[f's-{i//25:06d}.tar' for i in range(50)]))
    rows['shard_sha256'] = [file_sha256(tmp_path/s) for s in rows.shard]
    rows = rows.assign(label=[int(i) for i in y], caption='')
    lazy = open_images(tmp_path, rows)
    r = recipe(samples_seen_at_100=320, input_size=8)
    joined = join([lazy[:10], lazy[10:]])
    a, b = (train_net(create_net(r.arch, 2, 3, 0), images, y, r, 320, 3) for images in (x, joined))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    (tmp_path/'s-000001.tar').write_bytes(b'x')
    with pytest.raises(StudyError, match='s-000001.tar: the shard is damaged'):
        open_images(tmp_path, rows)

def test_a_set_of_larger_images_is_in_plain_tars_and_need_not_be_read_whole(tmp_path):
    from synthscale.shards import write_set
    rng = np.random.default_rng(0)
    samples = [dict(split='train', label=i % 2, image=noise(rng, s, s, 3)) for s in (64, 8) for i in range(6)]
    large, small = (write_set(tmp_path/k, part, ['a', 'b'], shard_size=4)
                    for k, part in (('large', samples[:6]), ('small', samples[6:])))
    assert large.shard.str.endswith('.tar').all() and small.shard.str.endswith('.tar.gz').all()
    whole, lazy = load_set(tmp_path/'large'), load_set(tmp_path/'large', lazy=True)
    assert np.array_equal(whole.images, np.asarray(lazy.images)) and np.array_equal(lazy.images[3], samples[3]['image'])
