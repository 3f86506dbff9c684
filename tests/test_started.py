"Networks that begin pretrained: real ImageNet weights on real photographs, kills, keys, and what is refused."
import signal, subprocess, sys, time
from pathlib import Path
from zipfile import ZipFile
import numpy as np, pytest
from conftest import ROOT, dump, edit, environment
from test_backbones import LITE0, SHARED, SMALL, small_net, small_study, study_in
from safetensors.torch import save_file
from synthscale.classify import point_config, run_point, run_points
from synthscale.curves import Point
from synthscale.data import build_set
from synthscale.params import problems, resolved
from synthscale.smoke import make_inputs
from synthscale.shards import load_set
from synthscale.started import features_of, started_net
from synthscale.study import Study, file_sha256
from synthscale.train import create_optimizer, features, parameter_groups, train_net

def begun(train, name='small', **keys):
    "A recipe that starts from a backbone."
    start = {'from': name, 'train': train} | keys.pop('start', {})
    return dict(reference='this test', start=start, samples_seen_at_100=640, samples_seen_power=0., batch_size=32,
                optimizer=dict(name='adamw', lr=.003, weight_decay=.1)) | keys

def smoke_with(folder, **recipes):
    "The smoke study with digits, a small random backbone and recipes that start from it."
    save_file(small_net().state_dict(), folder/'net.safetensors')
    small = SMALL | dict(sha256=file_sha256(folder/'net.safetensors'))
    study_in(folder, dict(small=small))
    edit(folder, lambda p: p['recipes'].update(recipes))
    make_inputs(folder/"data")
    study = Study(folder)
    build_set(study, 'digits')
    build_set(study, 'rendered')
    return study

WRONG = [
    (dict(start={'from': 'small', 'train': 'half'}), "train is 'half'"),
    (dict(start={'from': 'nothing', 'train': 'all'}), "no such model of type backbone"),
    (dict(start={'from': 'mini_sd', 'train': 'all'}), "no such model of type backbone"),
    (dict(arch=dict(name='resnet18')), "exactly one of the two, found both"),
    (dict(start=None), "exactly one of the two, found neither"),
    (dict(start={'from': 'small', 'train': 'head', 'head_lr': .1}), 'belong to train: all'),
    (dict(start={'from': 'small', 'train': 'head'}, augment=dict(flip=True)), 'no image can be varied'),
    (dict(start={'from': 'small', 'train': 'all', 'layer_decay': 1.5}), 'layer_decay is 1.5')]

@pytest.mark.parametrize('odd, says', WRONG, ids=[s[:24] for _, s in WRONG])
def test_a_start_that_cannot_be_is_said(tmp_path, odd, says):
    save_file(small_net().state_dict(), tmp_path/'net.safetensors')
    study_in(tmp_path, dict(small=SMALL | dict(sha256='0'*64)))
    edit(tmp_path, lambda p: p['recipes'].update(mine=begun('all') | odd))
    assert any(says in text for text in problems(Study(tmp_path))), problems(Study(tmp_path))

def test_weights_that_nothing_identifies_are_no_start(tmp_path):
    study = small_study(tmp_path)
    edit(tmp_path, lambda p: p['recipes'].update(mine=begun('all')))
    assert any('models.small.sha256 is missing: recipes.mine.start.from' in t for t in problems(Study(study.dir)))

def test_an_evaluator_begins_at_random(tmp_path):
    save_file(small_net().state_dict(), tmp_path/'net.safetensors')
    study_in(tmp_path, dict(small=SMALL | dict(sha256='0'*64)))
    edit(tmp_path, lambda p: (p['recipes'].update(mine=begun('all')),
                              p['evaluators']['real_classifier'].update(recipe='mine')))
    assert any("a recipe with 'arch'" in text for text in problems(Study(tmp_path)))

def test_an_evaluators_weights_and_points_keep_their_keys():
    "What a recipe is hashed as did not change when `start` came: no trained point is lost."
    r = Study(ROOT).recipes['convnext_digits']
    assert set(r.model_dump())-set(r.decisive) == {'reference', 'start'}

def test_what_decides_a_point_is_in_its_key(tmp_path):
    study = smoke_with(tmp_path, probe=begun('head'), tuned=begun('all'))
    p = Point('probe', 'digits', '', 20, 0, 0)
    one = point_config(study, p)
    assert one['start']['sha256'] and one != point_config(study, Point('tuned', 'digits', '', 20, 0, 0))
    seen = resolved(study)['recipes']['probe']
    def change(**keys):
        edit(tmp_path, lambda q: q['models']['small'].update(keys))
        changed = Study(tmp_path)
        assert point_config(changed, p) != one and resolved(changed)['recipes']['probe'] != seen
    change(mean=[.4]*3)
    change(mean=[.5]*3, input_size=40)
    save_file(small_net(seed=1).state_dict(), tmp_path/'net.safetensors')
    change(input_size=32, sha256=file_sha256(tmp_path/'net.safetensors'))

def test_features_are_computed_once_for_all_points(tmp_path):
    study = smoke_with(tmp_path, probe=begun('head'))
    points = [Point('probe', 'digits', '', n, 0, seed) for n in (10, 20) for seed in (0, 1)]
    points += [Point('probe', 'digits', 'rendered', 10, 40, 0, real_share=.5)]
    done = run_points(study, points, workers=1)
    kept = sorted((tmp_path/'build'/'features').iterdir())
    e = study.classify.eval
    assert len(kept) == len({(e.set_of(k), k) for k in e.every} | {('digits', 'train'), ('rendered', 'train')})
    times = [k.stat().st_mtime_ns for k in kept]
    (tmp_path/'build'/'points').rename(tmp_path/'build'/'old')
    again = run_points(study, points, workers=2)
    assert [k.stat().st_mtime_ns for k in kept] == times
    assert all(again[p]['tests'] == done[p]['tests'] and 'cached' not in again[p] for p in points)

def test_a_probe_is_trained_on_what_the_frozen_network_gives(tmp_path):
    "The head of a fine-tuned network and a probe see the same features."
    study = smoke_with(tmp_path, probe=begun('head'), tuned=begun('all'))
    images = load_set(study.set_dir('digits'), 'test').images[:12]
    net = started_net(study, study.recipes['tuned'], images, 0)
    f = features_of(study, study.recipes['probe'], 'digits', 'test')[:12]
    np.testing.assert_allclose(features(net, images), f, atol=1e-4)

@pytest.mark.parametrize('decay, head_lr', [(1., None), (.7, .01)])
def test_every_weight_is_learned_and_each_at_its_rate(tmp_path, decay, head_lr):
    study = smoke_with(tmp_path, tuned=begun('all', start=dict(head_lr=head_lr, layer_decay=decay)))
    recipe = study.recipes['tuned']
    x = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), np.uint8)
    net = started_net(study, recipe, x, 0)
    before = {k: v.clone() for k, v in net.named_parameters()}
    groups = parameter_groups(net.net, recipe.optimizer, recipe.start)
    of = {id(p): g['lr_scale'] for g in groups for p in g['params']}
    assert set(of) == {id(p) for p in net.parameters()}
    head = {of[id(p)] for p in net.net.get_classifier().parameters()}
    assert head == {1. if head_lr is None else head_lr/recipe.optimizer.lr}
    first = of[id(net.net.conv_stem.weight)]
    assert first == 1 if decay == 1 else 0 < first < .7
    opt = create_optimizer(net, recipe.optimizer, recipe.start)
    assert {g['lr_scale'] for g in opt.param_groups} == set(of.values())
    train_net(net, x, np.arange(32) % 10, recipe, 320, 0, n_classes=10)
    moved = {k: float((v-before[k]).detach().abs().max()) for k, v in net.named_parameters()}
    assert all(v > 0 for v in moved.values())
    if decay < 1:
        assert moved['net.conv_stem.weight'] < moved['net.classifier.weight']/20

KILLED = """
import sys
import synthscale.train as t
from synthscale.classify import run_point
from synthscale.curves import Point
from synthscale.loop import Loop
t.Loop = lambda *a, **k: Loop(*a[:8], 0., **k)        # its state is kept after every step
print('go', flush=True)
run_point(sys.argv[1], Point('tuned', 'digits', '', 40, 0, 0))
"""

def test_a_killed_fine_tuning_ends_as_if_it_had_not_been_killed(tmp_path):
    recipe = begun('all', samples_seen_at_100=6400, start=dict(head_lr=.01, layer_decay=.8))
    (tmp_path/'a').mkdir()
    (tmp_path/'b').mkdir()
    whole, broken = (smoke_with(tmp_path/k, tuned=recipe) for k in 'ab')
    p = Point('tuned', 'digits', '', 40, 0, 0)
    want = run_point(whole.dir, p)['tests']
    seen = set()
    for _ in range(2):
        job = subprocess.Popen([sys.executable, '-c', KILLED, str(broken.dir)], stdout=subprocess.PIPE, text=True,
                               env=environment() | dict(PYTHONPATH=str(ROOT)))
        assert job.stdout.readline() == 'go\n'
        while job.poll() is None and not (now := steps_done(broken)-seen):
            time.sleep(.05)
        job.send_signal(signal.SIGKILL)
        job.wait()
        seen |= now
    assert seen and max(seen) < 200 and not [*broken.path('build', 'points').rglob('*.json')]
    assert run_point(broken.dir, p)['tests'] == want

def steps_done(study):
    "The step of the state that is kept."
    from synthscale.loop import _parts
    return {int(_parts(f.read_bytes())[1]['step']) for f in study.path('build', 'weights').rglob('state.safetensors')}

@pytest.mark.slow
@pytest.mark.skipif(not (SHARED/'cifar10_jpg.zip').exists(), reason='no CIFAR-10 photographs beside the repository')
def test_real_weights_know_more_of_photographs_than_random_ones(tmp_path):
    "Lite0 on 100 and 400 photographs of CIFAR-10: probe and fine-tuning beat scratch, and more photographs help both."
    classes = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
    small = dict(name='resnet18', stem='cifar', kwargs=dict(channels=[16, 32, 64, 128], layers=[1, 1, 1, 1]))
    adamw = dict(name='adamw', lr=.003, weight_decay=.1)
    recipes = dict(
        probe=begun('head', 'lite0', input_size=64, samples_seen_at_100=6400),
        tuned=begun('all', 'lite0', input_size=64, samples_seen_at_100=1600, start=dict(head_lr=.005, layer_decay=.9),
                    optimizer=dict(name='adamw', lr=.003, weight_decay=.05), augment=dict(flip=True, crop=2)),
        scratch=dict(reference='this test', arch=small, samples_seen_at_100=6400, samples_seen_power=0., batch_size=32,
                     optimizer=adamw, augment=dict(flip=True, crop=2)))
    with ZipFile(SHARED/'cifar10_jpg.zip') as z:
        for part, per in (('train', 60), ('test', 30)):
            for c in classes:
                names = sorted(n for n in z.namelist() if f'{part}/{c}/' in n and n.endswith('.jpg'))[:per]
                for n in names:
                    to = tmp_path/'photos'/part/c/Path(n).name
                    to.parent.mkdir(parents=True, exist_ok=True)
                    to.write_bytes(z.read(n))
    dump(dict(root=str(ROOT), study=dict(name='cifar', classes=classes), generate=dict(sources={}),
              data=dict(root='.', image_size=32, channels=3, sets=dict(photos=dict(
                  type='imagefolder', input='photos', hold_out=dict(val=200),
                  splits=dict(train='train', test='test')))),
              models=dict(lite0=LITE0), recipes=recipes,
              classify=dict(eval=dict(set='photos', validation='val', test_splits=['test'], ood_set='photos',
                                      in_domain_set='photos'), recipe='probe', compute_seeds=0,
                            curves=dict(photos=dict(set='photos', n_images=[100])))), tmp_path/'params.yaml')
    study = Study(tmp_path)
    assert problems(study) == []
    build_set(study, 'photos')
    points = [Point(r, 'photos', '', n, 0, 0) for r in recipes for n in (100, 400)]
    loss = {(p.recipe, p.n_real): r['tests']['test']['loss_calibrated'] for p, r in run_points(study, points).items()}
    assert all(loss['probe', n] < loss['scratch', n]-.2 for n in (100, 400)), loss
    assert all(loss['tuned', n] < loss['scratch', n]-.1 for n in (100, 400)), loss
    assert all(loss[r, 400] < loss[r, 100] for r in ('probe', 'tuned'))
