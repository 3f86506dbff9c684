"What a library, a model's folder or an option promises is tried or refused by name before an image is stored."
import json, os, subprocess, sys, threading
from functools import partial
from types import SimpleNamespace
import diffusers, numpy as np, psutil, pytest, torch
from conftest import ROOT, environment, load
from synthscale.generate import Source, images_there
from synthscale.models import HubFiles, build_model, fetch
from synthscale.params import check_study
from synthscale.pipelines import Sampler, check_repeats, model_origin, sampling_settings
from synthscale.random_pipelines import TINY, tiny_if, tiny_if_sr, tiny_sd
from synthscale.recipes import Arch
from synthscale.study import Study, StudyError, validated
from synthscale.workers import generate_source
import test_engine
from test_engine import NAME, change, files

generated, study = test_engine.generated, test_engine.study       # fixtures
torch.set_num_threads(1)
ASK = dict(guidance_scale=2., steps=3, scheduler='', size=None, safety_checker=False, upscale=None)
HOW = SimpleNamespace(dtype='float32', channels_last=False, compile='no')
WORDS = ['zero', 'one', 'two']

def sampler(folder, **asked):
    "A sampler of three images."
    return Sampler(folder, sampling_settings(folder, HOW, SimpleNamespace(**ASK | asked)), WORDS, 3)

def refused(p):
    "What is said of a sampler whose images are drawn again."
    images = p.sample(WORDS, [1, 2, 3])[0]
    with pytest.raises(StudyError, match='does not depend on its prompt') as e:
        check_repeats(p, WORDS, [1, 2, 3], images)
    return str(e.value)

# ---- images drawn again

def own_noise(scheduler):
    "A step that adds noise of its own."
    real = scheduler.step
    def step(*a, **k):
        out = list(real(*a, **k))
        out[0] = out[0]+.5*torch.randn(out[0].shape)
        return tuple(out)
    scheduler.step = step

def one_generator(scheduler):
    "A step whose noise is that of the first image's generator."
    real = scheduler.step
    def step(*a, generator=None, **k):
        out = list(real(*a, **k))
        out[0] = out[0]+.5*torch.randn(out[0].shape, generator=generator[0])
        return tuple(out)
    scheduler.step = step

def of_neighbours(p):
    "A network that mixes the images of a batch, as batch norm in training does."
    p.pipe.unet.register_forward_hook(lambda m, i, out: (out[0]+out[0].mean(0, keepdim=True), *out[1:]))

def of_the_clock(p):
    "A network that changes from call to call."
    calls = iter(range(10**6))
    p.pipe.unet.register_forward_hook(lambda m, i, out: (out[0]*(1+.01*next(calls)), *out[1:]))

@pytest.mark.parametrize('fault', [own_noise, one_generator, of_neighbours, of_the_clock])
def test_an_image_that_does_not_depend_on_its_seed_alone_is_found(tmp_path, fault):
    p = sampler(tiny_sd(tmp_path/'m'), scheduler='DDIMScheduler')
    check_repeats(p, WORDS, [1, 2, 3], p.sample(WORDS, [1, 2, 3])[0])
    fault(p.pipe.scheduler if fault in (own_noise, one_generator) else p)
    said = refused(p)
    assert said.startswith('alone') == (fault in (one_generator, of_neighbours)) and 'DDIMScheduler' in said

def test_a_scheduler_of_the_library_that_takes_no_generator_is_found(tmp_path):
    "FlowMatchLCMScheduler, accepted for SD 3: its noise is nobody's."
    assert 'FlowMatchLCMScheduler' in refused(sampler(TINY['sd3'](tmp_path/'m'), scheduler='FlowMatchLCMScheduler'))

def test_dpm_solver_sde_is_found_or_its_package_is_named(tmp_path):
    folder = tiny_sd(tmp_path/'m')
    try:
        import torchsde   # noqa: F401
    except ImportError:
        with pytest.raises(StudyError, match='needs the package torchsde'):
            sampler(folder, scheduler='DPMSolverSDEScheduler')
    else:
        assert 'DPMSolverSDEScheduler' in refused(sampler(folder, scheduler='DPMSolverSDEScheduler'))

def test_every_scheduler_that_can_take_the_place_of_another_keeps_the_promise_or_is_refused(tmp_path):
    folder, kept = tiny_sd(tmp_path/'m'), []
    for name in {str(n) for n in diffusers.DPMSolverMultistepScheduler._compatibles}:
        try:
            p = sampler(folder, scheduler=name)
            check_repeats(p, WORDS, [1, 2, 3], p.sample(WORDS, [1, 2, 3])[0])
            kept.append(name)
        except StudyError as e:
            assert name in str(e)
    assert {'DDIMScheduler', 'EulerAncestralDiscreteScheduler', 'KDPM2AncestralDiscreteScheduler'} <= {*kept}

def test_a_source_that_breaks_the_promise_stores_nothing_and_one_that_keeps_it_is_tried_once(study, monkeypatch):
    passes, real = [], Sampler.sample
    def count(self, prompts, seeds):
        passes.append(len(prompts))
        images, *rest = real(self, prompts, seeds)
        return (images+noise()).astype(np.uint8), *rest
    monkeypatch.setattr(Sampler, 'sample', count)
    rng = np.random.default_rng(0)
    noise = partial(rng.integers, 0, 100)
    with pytest.raises(StudyError, match='Nothing was stored'):
        generate_source(study, NAME, workers=1)
    src = Source(study, NAME)
    assert images_there(src, src.shards) == 0 and passes[:2] == [12, 12]
    noise = partial(int, 0)
    passes.clear()
    generate_source(study, NAME, workers=1)
    assert files(study) == study.whole and sorted(passes)[:2] == [1, 1] and len(passes) == 14+3
    passes.clear()
    file = study.set_dir(NAME)/'names_g2-000000.tar.gz'
    file.unlink()
    generate_source(study, NAME, workers=1)                                  # a later run is not tried again
    assert files(study) == study.whole and passes == [12, 12, 6]

# ---- options

@pytest.mark.parametrize('key, value', [
    ('guidance_scale', float('inf')), ('guidance_scale', float('-inf')), ('guidance_scale', float('nan')),
    ('guidance_scale', -1.), ('steps', -3), ('steps', 0), ('size', -8), ('size', 0), ('n_images', -1),
    ('guidance_scale', True), ('steps', 2.5)])
def test_an_option_that_makes_no_sense_is_refused_by_its_key(key, value):
    p = load(ROOT/'params.yaml')
    p['generate']['sources']['reference'][key] = value
    with pytest.raises(StudyError, match=f'generate.sources.reference.{key}'):
        check_study(Study(ROOT, p))

@pytest.mark.parametrize('asked, words', [
    (dict(steps=2000), 'steps is 2000: expected at most 1000'),
    (dict(guidance_scale=float('inf')), 'any finite number'),
    (dict(size=20), 'size 20: ValueError'), (dict(scheduler='EDMEulerScheduler'), 'has no beta_schedule'),
    (dict(scheduler='SchedulerMixin'), 'no such scheduler'),
    (dict(scheduler='FlowMatchHeunDiscreteScheduler'), 'cannot')])
def test_what_a_model_cannot_do_is_named(tmp_path, asked, words):
    with pytest.raises(StudyError, match=words):
        sampler(tiny_sd(tmp_path/'m'), **asked).sample(WORDS, [1, 2, 3])

def edit(file, **values):
    "Other values in a JSON file."
    file.write_text(json.dumps(json.loads(file.read_text()) | values))

def test_what_other_families_cannot_do_or_ignore_is_named(tmp_path):
    flux = TINY['flux'](tmp_path/'flux')
    with pytest.raises(StudyError, match='size is 18: FluxPipeline generates 16 x 16'):      # resized without a word
        sampler(flux, size=18).sample(WORDS, [1, 2, 3])
    with pytest.raises(StudyError, match='cannot take the place'):
        sampler(flux, scheduler='EulerDiscreteScheduler')
    edit(flux/'transformer'/'config.json', guidance_embeds=False)                            # as FLUX schnell
    with pytest.raises(StudyError, match='guidance_scale is 2.0: expected 0'):
        sampler(flux)
    sd = tiny_sd(tmp_path/'sd')
    edit(sd/'scheduler'/'scheduler_config.json', prediction_type='v_prediction')
    edit(sd/'scheduler'/'scheduler_config.json', rescale_betas_zero_snr=True)
    with pytest.raises(StudyError, match='has no rescale_betas_zero_snr'):
        sampler(sd, scheduler='PNDMScheduler')
    deep = tiny_if(tmp_path/'if')
    tiny_if_sr(deep/'upscaler')
    for up, key in ((dict(noise_level=5000), 'upscale.noise_level'), (dict(steps=5000), 'steps')):
        with pytest.raises(StudyError, match=f'{key} is 5000'):
            sampler(deep, upscale=SimpleNamespace(model_dump=lambda up=up: up))

@pytest.mark.parametrize('arch', [
    dict(name='efficientnet_lite0.ra_in1k'), dict(name='hf-hub:timm/resnet18.a1_in1k'), dict(name='local-dir:/tmp/x'),
    dict(kwargs=dict(checkpoint_path='mine.pth')), dict(kwargs=dict(pretrained=True)),
    dict(kwargs=dict(pretrained=False)),
    dict(kwargs=dict(pretrained_cfg='a1_in1k')), dict(kwargs=dict(pretrained_cfg_overlay='x')),
    dict(kwargs=dict(file='x.safetensors')), dict(kwargs=dict(url='https://x')), dict(kwargs=dict(hf_hub_id='timm/x')),
    dict(kwargs=dict(cache_dir='x')), dict(kwargs=dict(weights='IMAGENET1K_V1')),
    dict(kwargs=dict(other='w/eights.pt'))])
def test_weights_that_would_be_ignored_or_untracked_are_refused(arch):
    with pytest.raises(StudyError, match='r.arch.*pretrained weights are named by `start` in its place'):
        validated(Arch, dict(name='resnet18') | arch, 'recipes.r.arch', 'params.yaml')

@pytest.mark.parametrize('key', ['features_only', 'out_indices', 'num_classes', 'in_chans', 'feature_cfg'])
def test_what_the_study_sets_of_a_network_is_refused(key):
    with pytest.raises(StudyError, match=f'{key} cannot be set here'):
        validated(Arch, dict(name='resnet18', kwargs={key: 1}), 'recipes.r.arch', 'params.yaml')

# ---- folders of models

def outside(d):
    (d.parent/'secret.json').write_text('{"token": 1}')
    (d/'tokenizer'/'notes.json').symlink_to(d.parent/'secret.json')

def relative(d):
    outside(d)
    (d/'tokenizer'/'notes.json').unlink()
    (d/'tokenizer'/'notes.json').symlink_to('../../secret.json')

def folder_outside(d):
    (d.parent/'more').mkdir()
    (d.parent/'more'/'x.json').write_text('{}')
    (d/'more').symlink_to(d.parent/'more')

def by_two_links(d):
    outside(d)
    (d/'unet'/'a.json').symlink_to('../tokenizer/notes.json')

def loop(d):
    (d/'unet'/'loop').symlink_to(d)

def loop_of_links(d):
    (d/'a.json').symlink_to('b.json')
    (d/'b.json').symlink_to('a.json')

def dangling(d):
    (d/'unet'/'gone.json').symlink_to('nowhere.json')

def pipe(d):
    os.mkfifo(d/'unet'/'pipe.json')

def note(text):
    def origin(d):
        (d/'origin.json').write_bytes(text)
    return origin

def index(d):
    (d/'unet'/'x.safetensors.index.json').write_text('{"weight_map": {"a": "../../secret.safetensors"}}')

def no_index(d):
    (d/'unet'/'x.safetensors.index.json').write_text('[]')

def scheduler(d):
    (d/'scheduler'/'scheduler_config.json').write_text('none')

@pytest.mark.parametrize('change_, words', [
    (outside, 'notes.json: a link to .*secret.json, out of'), (relative, 'notes.json: a link to .*secret.json, out of'),
    (folder_outside, 'more: a link to .*out of'), (by_two_links, 'a link to .*secret.json, out of'),
    (loop, 'loop: a link to the folder'), (loop_of_links, 'a.json: a link to b.json, which is not there or leads back'),
    (dangling, 'gone.json: a link to nowhere.json, which is not there'), (pipe, 'pipe.json: neither a file nor'),
    (note(b'saved by me'), 'origin.json: not readable as JSON'), (note(b'[1]'), 'origin.json: expected an object'),
    (note(b'\xff\xfe'), 'origin.json: not readable as JSON'), (note(b'{"variant": 16}'), 'origin.json: variant is 16'),
    (note(b''), 'origin.json: not readable as JSON'),
    (index, "index.json: the weights '../../secret.safetensors' are not in this folder"),
    (no_index, 'index.json: expected an object')], ids=lambda v: getattr(v, '__name__', None))
def test_a_models_folder_with_odd_things_in_it_is_refused_by_name(study, change_, words):
    change_(tiny_sd(study.dir/'mine'/'model'))
    p = load(study.dir/'params.yaml')
    p['models']['mine'] = dict(type='local', input='mine/model')
    with pytest.raises(StudyError, match=words):
        build_model(Study(study.dir, p), 'mine')
    assert not study.path('models', 'mine').exists()

def test_a_schedulers_file_that_is_no_json_is_named(tmp_path):
    folder = tiny_sd(tmp_path/'m')
    scheduler(folder)
    with pytest.raises(StudyError, match='scheduler_config.json: not readable as JSON'):
        sampler(folder)

def test_a_link_inside_is_read_and_a_name_is_left_out_at_its_own_place_only(study):
    "The upscaler's folder is called like a part of the first stage, and like a folder inside one."
    home = tiny_if(study.dir/'mine')
    tiny_if_sr(home/'two')
    (home/'unet'/'two').mkdir()
    (home/'unet'/'two'/'note.json').write_text('{}')
    (home/'unet'/'OLD.BIN').write_bytes(b'pickle')
    os.link(home/'unet'/'config.json', home/'unet'/'first.json')
    (home/'unet'/'second.json').symlink_to('config.json')
    p = load(study.dir/'params.yaml')
    p['models']['mine'] = dict(type='local', input='mine', upscaler='mine/two')
    out = build_model(Study(study.dir, p), 'mine')
    assert (out/'unet'/'two'/'note.json').exists() and not (out/'two').exists() and (out/'upscaler'/'unet').is_dir()
    assert not (out/'unet'/'second.json').is_symlink() and not (out/'unet'/'OLD.BIN').exists()
    assert model_origin(out)['model_sha256']

@pytest.mark.parametrize('error', [TimeoutError(), ValueError(''), OSError('\n'), RuntimeError('one\ntwo')])
def test_a_download_that_fails_without_a_word_is_named_too(monkeypatch, tmp_path, error):
    def fails(*a, **k):
        raise error
    monkeypatch.setattr('huggingface_hub.hf_hub_download', fails)
    with pytest.raises(StudyError, match=f'lab/model@0123456789ab: cannot be fetched.*{type(error).__name__}'):
        fetch(HubFiles(repo='lab/model', revision='0123456789abcdef0123456789abcdef01234567'), tmp_path)

# ---- Ray

@pytest.mark.slow
def test_ray_listens_on_the_loopback_alone(study, ray_turn):
    "Also where Ray was imported in this process before, when nothing asked for the loopback or a token."
    with pytest.raises(StudyError, match="Ray at 'nonsense' does not start"):
        generate_source(study, NAME, address='nonsense')
    study = change(study, steps=60)
    seen, over = set(), threading.Event()
    def look():
        while not over.wait(.3):
            for p in psutil.Process().children(recursive=True):
                try:
                    seen.update((p.name(), c.laddr.ip) for c in p.net_connections('inet')
                                if c.status == psutil.CONN_LISTEN)
                except psutil.Error:
                    continue
    t = threading.Thread(target=look, daemon=True)
    t.start()
    generate_source(study, NAME, workers=2)
    over.set()
    t.join(60)
    names = {n for n, _ in seen}
    assert {'gcs_server', 'raylet'} <= names and any(n.startswith('ray::') for n in names)
    assert {ip.removeprefix('::ffff:') for _, ip in seen} <= {'127.0.0.1', '::1'}, seen
    assert 'RAY_AUTH_TOKEN' not in os.environ                  # of that run alone

STRANGERS = """
import os, subprocess, sys
from synthscale.workers import _environment, _private, _start_ray
ask = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR'); print('connected')"
with _environment(_private()):
    ray = _start_ray(1, '')
    port = ray._private.worker._global_node.gcs_address
    def heard(**env):
        r = subprocess.run([sys.executable, '-c', ask, port], env=os.environ | env, capture_output=True, text=True)
        return 'connected' if 'connected' in r.stdout else 'refused'
    print(heard(RAY_AUTH_TOKEN='f'*64), heard(RAY_AUTH_MODE='disabled', RAY_AUTH_TOKEN=''), heard())
    ray.shutdown()
"""

@pytest.mark.slow
def test_ray_asks_for_its_token(tmp_path, ray_turn):
    "Another user of this machine: with another token, without one; and who has it."
    env = environment() | {'PYTHONPATH': str(ROOT)}
    r = subprocess.run([sys.executable, '-c', STRANGERS], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert r.stdout.split()[-3:] == ['refused', 'refused', 'connected'], r.stdout+r.stderr[-2000:]
