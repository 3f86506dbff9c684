"The trainer: killed runs, many processes, images that stay on disk, and what stops a run."
import json, signal, subprocess, sys, time
import numpy as np, pytest, torch
from conftest import ROOT, environment
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from synthscale.study import StudyError
from synthscale.trainer import METRICS, Mix, NotFinite, Recipe, create_net, index_stream, logits, measure, train_and_measure, train_net

torch.set_num_threads(1)
VIT = dict(name='vit_tiny_patch16_224', kwargs=dict(img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2, drop_path_rate=.1, class_token=False, global_pool='avg'))
RICH = dict(origin='a test', arch=VIT, samples_at_100=6400, samples_power=0., batch_size=32, optimizer=dict(name='adamw', lr=2e-3, weight_decay=.05, clip=1.), label_smoothing=.1, ema=.98,
            augment=dict(affine=.5, flip=True, crop=1, mixup=.2, cutmix=.5))

def recipe(**kw): return Recipe.model_validate(RICH | kw)

# ---- killed and resumed

TRAIN = """
import numpy as np, sys, torch
from safetensors.torch import save_file
from synthscale.trainer import Recipe, create_net, train_net
import json
torch.set_num_threads(1)
r = Recipe.model_validate(json.loads(sys.argv[1]))
x = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1)).astype(np.uint8); y = np.arange(64) % 4
net = train_net(create_net(r.arch, 4, 1, 0), x, y, r, r.samples_seen(64), 5, state='state.safetensors', every=.2)
save_file(net.state_dict(), 'done.safetensors')
"""

def test_a_run_killed_again_and_again_ends_with_the_same_weights(tmp_path):
    "SIGKILL at random moments; dropped paths, mixing, averaged weights and all."
    spec = json.dumps(RICH | dict(samples_at_100=25600))
    def start(d):
        d.mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, '-c', TRAIN, spec], cwd=d, env=environment() | {'PYTHONPATH': str(ROOT)}, stderr=subprocess.DEVNULL)
    assert start(tmp_path/'whole').wait(300) == 0
    rng, kills, d = np.random.default_rng(0), 0, tmp_path/'killed'
    def stamp(): return (d/'state.safetensors').stat().st_mtime_ns if (d/'state.safetensors').exists() else 0
    for _ in range(4):
        before = stamp()
        p = start(d)
        while stamp() == before and p.poll() is None: time.sleep(.02)
        time.sleep(rng.uniform(0, .3))
        if p.poll() is None: p.send_signal(signal.SIGKILL); p.wait(); kills += 1
    assert start(d).wait(300) == 0 and kills >= 2
    a, b = (load_file(tmp_path/k/'done.safetensors') for k in ('whole', 'killed'))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_a_state_of_another_network_is_refused(tmp_path):
    x, y = np.zeros((32, 8, 8, 1), np.uint8), np.arange(32) % 2
    r = recipe(samples_at_100=64)
    train_net(create_net(r.arch, 2, 1, 0), x, y, r, 64, 0, state=tmp_path/'s', every=0.)
    wide = recipe(arch=VIT | dict(kwargs=VIT['kwargs'] | dict(embed_dim=64)))
    with pytest.raises(StudyError, match='state of another network'): train_net(create_net(wide.arch, 2, 1, 0), x, y, wide, 64, 0, state=tmp_path/'s')

# ---- one process or two

TWO = """
import json, sys, numpy as np, torch
import synthscale.trainer as t
from synthscale.trainer import Recipe
torch.set_num_threads(1)
r, out = Recipe.model_validate(json.loads(sys.argv[1])), sys.argv[2]
x = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1)).astype(np.uint8); y = np.arange(64) % 4
seen, real = [], t.losses
def losses(*a):
    l = real(*a); seen.append(l.detach().mean()); return l
t.losses = losses
acc = t.accelerator(r, cpu=True)
net = t.train_net(t.create_net(r.arch, 4, 1, 0), x, y, r, r.samples_seen(64), 5, acc=acc)
per_step = acc.reduce(torch.stack(seen), 'mean')
if acc.is_main_process: json.dump(dict(losses=per_step.tolist(), n=acc.num_processes, w=float(sum(p.abs().sum() for p in net.parameters()))), open(out, 'w'))
"""

@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path):
    "torchrun with gloo, the same global batch, a network without batch norm: equal but for rounding, 1e-4 of the loss over 60 steps."
    plain = RICH | dict(samples_at_100=32*60, arch=VIT | dict(kwargs=VIT['kwargs'] | dict(drop_path_rate=0.)), augment=dict(affine=.5, flip=True, crop=1), optimizer=dict(name='sgd', lr=.05, weight_decay=1e-3, kwargs=dict(momentum=.9), clip=1.))
    (tmp_path/'two.py').write_text(TWO)
    got = {}
    for n in (1, 2):
        cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'] if n == 2 else [sys.executable]
        r = subprocess.run([*cmd, 'two.py', json.dumps(plain), f'{n}.json'], cwd=tmp_path, env=environment() | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=300)
        assert r.returncode == 0, r.stderr[-3000:]
        got[n] = json.loads((tmp_path/f'{n}.json').read_text())
    assert (got[1]['n'], got[2]['n']) == (1, 2) and len(got[1]['losses']) == 60
    a, b = np.array(got[1]['losses']), np.array(got[2]['losses'])
    assert np.abs(a/b-1).max() < 1e-4 and a[-10:].mean() < a[:10].mean()
    assert got[1]['w'] == pytest.approx(got[2]['w'], rel=1e-5)

# ---- what is shown

@given(st.integers(2, 40), st.integers(1, 39), st.floats(.05, .95), st.integers(2, 16), st.integers(1, 20), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_every_batch_holds_its_share_of_real_images(n, n_real, share, batch, steps, seed):
    n_real = min(n_real, n-1)
    s = index_stream(n, steps, batch, torch.Generator().manual_seed(seed), Mix(n_real, share))
    k = min(max(round(batch*share), 1), batch-1)
    assert s.shape == (steps, batch) and ((s < n_real).sum(1) == k).all()
    for kind in (s[s < n_real], s[s >= n_real]):
        counts = torch.bincount(kind)[torch.bincount(kind) > 0]
        assert counts.max()-counts.min() <= 1                                # every image of a kind as often as any other, but for the last pass

@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_by_count_every_image_is_shown_as_often(n, steps, batch, seed):
    c = torch.bincount(index_stream(n, steps, batch, torch.Generator().manual_seed(seed)).flatten(), minlength=n)
    assert c.max()-c.min() <= 1

def test_a_weight_of_nearly_nothing_is_training_without():
    "Synthetic images whose loss hardly counts change what a network of one's own real images learns by next to nothing."
    r = recipe(batch_size=16, augment={}, ema=0., arch=VIT | dict(kwargs=VIT['kwargs'] | dict(drop_path_rate=0.)), optimizer=dict(name='sgd', lr=.1, weight_decay=0.))
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 8, 8, 1)).astype(np.uint8), np.arange(40) % 2
    wrong = y.copy(); wrong[20:] = 1-y[20:]
    nets = [train_net(create_net(r.arch, 2, 1, 0), x, labels, r, 320, 1, Mix(20, .5, 1e-9), 2) for labels in (y, wrong)]
    assert (logits(nets[0], x)-logits(nets[1], x)).abs().max() < 1e-5
    full = [train_net(create_net(r.arch, 2, 1, 0), x, labels, r, 320, 1, Mix(20, .5, 1.), 2) for labels in (y, wrong)]
    assert (logits(full[0], x)-logits(full[1], x)).abs().max() > 1e-2

class OnDisk:
    "Images in files, read one by one."
    def __init__(self, folder, images):
        self.files = [folder/f'{i}.npy' for i in range(len(images))]
        for f, a in zip(self.files, images): np.save(f, a)
    def __len__(self): return len(self.files)
    def __getitem__(self, i): return np.load(self.files[i]) if isinstance(i, int) else np.stack([np.load(f) for f in self.files[i]])

def test_images_on_disk_train_as_images_in_memory_do(tmp_path):
    "The same stream, read by two decoding processes."
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (50, 12, 12, 3)).astype(np.uint8), np.arange(50) % 2
    r = recipe(samples_at_100=320, input_size=8)
    a, b = (train_net(create_net(r.arch, 2, 3, 0), images, y, r, 320, 3) for images in (x, OnDisk(tmp_path, x)))
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert (logits(a, x, size=8)-logits(a, OnDisk(tmp_path, x), 16, size=8)).abs().max() < 1e-5

# ---- what stops a run, and what is kept of it

def test_a_loss_that_is_not_finite_names_its_step_and_its_images():
    x, y = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1)).astype(np.uint8), np.arange(40) % 2
    r = recipe(optimizer=dict(name='sgd', lr=1e30, weight_decay=0.), ema=0.)
    with pytest.raises(NotFinite, match=r'not finite at step \d+ of 200') as e: train_net(create_net(r.arch, 2, 1, 0), x, y, r, 6400, 0)
    assert 0 < e.value.step < 51 and len(e.value.positions) == 32 and max(e.value.positions) < 40

def test_checkpoints_keep_the_best_and_the_last_weights_and_survive_a_stop(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (96, 8, 8, 1)).astype(np.uint8), np.arange(96) % 4
    x[np.arange(96), y] = 255
    r, val, test = recipe(samples_at_100=1920), (x[64:80], y[64:80]), (x[80:], y[80:])
    got = train_and_measure(x[:64], y[:64], dict(val=val, test=test), r, 4, 1920, 0, checkpoints=4, folder=tmp_path)
    seen = json.loads((tmp_path/'validation.json').read_text())
    assert list(seen) == ['15', '30', '45', '60'] and got['val']['loss'] == pytest.approx(seen['60'])
    net = create_net(r.arch, 4, 1, 9)
    for name, loss in (('last', seen['60']), ('best', min(seen.values()))):
        net.load_state_dict(load_file(tmp_path/f'{name}.safetensors'))
        assert measure(logits(net, val[0]), val[1], 4)['loss'] == pytest.approx(loss)

def test_bf16_trains_nearly_as_float32_does_and_is_measured_in_float32():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (64, 8, 8, 1)).astype(np.uint8), np.arange(64) % 2
    x[y == 1, :, :2] = 255
    nets = [train_net(create_net(r.arch, 2, 1, 0), x, y, r, 1920, 0) for p in ('no', 'bf16') for r in [recipe(samples_at_100=1920, precision=p)]]
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
    assert m['loss'] == pytest.approx(log_loss(y, p, labels=range(k)), rel=1e-6) and m['top1'] == pytest.approx(accuracy_score(y, p.argmax(1)))
    assert m['top1'] <= m['top5'] <= 1 and 0 <= m['ece'] <= 1
    w = measure(out, y, k, within=True)
    assert w['loss'] <= m['loss']+1e-9 and w['top1'] >= m['top1']            # fewer rivals
    perm = rng.permutation(n)
    again = measure(out[perm], y[perm], k)
    assert all(again[q] == pytest.approx(m[q]) for q in METRICS)

@pytest.mark.parametrize('change, words', [(dict(optimizer=dict(name='adamwx', lr=.1, weight_decay=0.)), "optimizer 'adamwx'"), (dict(arch=dict(name='resnet18x')), 'no such model'),
                                           (dict(augment=dict(transform=dict(scale=[.1, 1.], nonsense=1))), 'create_transform does not take it'), (dict(input_size=64), 'input_size is 64')])
def test_what_a_recipe_cannot_be_is_said(change, words):
    x, y = np.zeros((32, 8, 8, 1), np.uint8), np.arange(32) % 2
    with pytest.raises(StudyError, match=words): train_net(create_net((r := recipe(**change)).arch, 2, 1, 0), x, y, r, 64, 0)
