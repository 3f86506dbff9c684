"Adapted models: only training photos are learned from, kills, the weights that are fused, copies, and DVC."
import copy, json, os, signal, subprocess, sys, time
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file
from conftest import ROOT, WAIT, dump, edit, environment, load, ran, sh
from synthscale import adapted
from synthscale.adapted import (adapt_model, adapted_card, adapted_key, add_lora, drawn_copies, noise_error,
                                photo_latents, step_flops, training_photos, write_adapted)
from synthscale.generate import Source
from synthscale.params import problems, resolved
from synthscale.pipelines import load_pipeline
from synthscale.random_pipelines import tiny_sd, tiny_sdxl
from synthscale.shards import ImageSet, load_set, read_manifest
from synthscale.smoke import smoke_adapted_study, smoke_params, with_adapted
from synthscale.study import Study, StudyError, file_sha256
from synthscale.workers import generate_source

@pytest.fixture(scope='module')
def study():
    "The smoke study with an adapted model, made once."
    s = Study(smoke_adapted_study())
    adapt_model(s, 'by_hand')
    return s

def changed(study, **keys):
    "The same study with other keys of its adapted model."
    p = copy.deepcopy(study.raw)
    p['adapted']['by_hand'] |= keys
    return Study(study.dir, p)

def files(folder):
    "The hashes of the files of a folder."
    return {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(folder.rglob('*')) if p.is_file()}

# ---- what is learned from

def test_only_the_training_split_is_learned_from(study, monkeypatch):
    "Its images and labels, in the order of the manifest; nothing of another split reaches the training."
    seen = {}
    real = adapted.train_lora
    def spy(pipe, photos, *a):
        seen['images'] = photos.images.copy()
        return real(pipe, photos, *a)
    monkeypatch.setattr(adapted, 'train_lora', spy)
    again = changed(study, steps=1)
    work = study.path('build', 'spy')
    adapted._adapt(again, 'by_hand', training_photos(again, 'by_hand'), work, work/'pipeline')
    m = read_manifest(study.set_dir('digits'))
    assert len(seen['images']) == (m.split == 'train').sum() < len(m)
    assert (seen['images'] == load_set(study.set_dir('digits'), 'train').images).all()

def test_a_training_photo_that_is_tested_on_is_an_error(study):
    p = copy.deepcopy(study.raw)
    p['classify']['eval']['test_splits'] = ['test', 'train']
    with pytest.raises(StudyError, match="training photos of set 'digits' are also images of split 'train'"):
        adapt_model(Study(study.dir, p), 'by_hand')

def test_what_decides_a_model_is_in_its_key(study):
    photos = training_photos(study, 'by_hand')
    keys = [adapted_key(changed(study, **k), 'by_hand', photos)
            for k in ({}, dict(steps=61), dict(rank=5), dict(snr_gamma=None), dict(prompts='described'))]
    fewer = ImageSet('digits', photos.images[1:], photos.labels[1:], photos.manifest[1:])
    turned = ImageSet('digits', photos.images, (photos.labels+1) % 10, photos.manifest)
    keys += [adapted_key(study, 'by_hand', s) for s in (fewer, turned)]
    assert len(set(keys)) == len(keys)
    assert adapted_key(study, 'by_hand', photos) == keys[0]

# ---- the weights

def tiny(folder):
    "A real class of pipeline with small random weights, and the same once more with additions that are not nothing."
    base = tiny_sd(folder/'base')
    pipe = load_pipeline(base)
    add_lora(pipe.unet, 3, 0)
    with torch.no_grad():
        for k, p in pipe.unet.named_parameters():
            if 'lora_B' in k:
                p.normal_(0, .3, generator=torch.Generator().manual_seed(len(k)))
    return base, pipe

def outputs(pipe):
    "What a denoiser says of one input."
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 4, 4, generator=g), torch.randn(2, 16, 16, generator=g)
    with torch.no_grad():
        return pipe.unet(x, torch.tensor([3, 700]), text).sample

def test_the_fused_model_is_the_model_with_its_additions_and_the_file_in_lora_gives_it_too(tmp_path):
    base, pipe = tiny(tmp_path)
    write_adapted(base, pipe.unet, tmp_path/'out')
    shared = load_pipeline(base)
    shared.load_lora_weights(str(tmp_path/'out'/'lora'), weight_name='pytorch_lora_weights.safetensors')
    a, b, c, plain = (outputs(p) for p in (pipe, load_pipeline(tmp_path/'out'), shared, load_pipeline(base)))
    assert (a-b).abs().max() < 1e-4 and (a-c).abs().max() < 1e-5 and (a-plain).abs().max() > .01
    before, after = files(base), files(tmp_path/'out')
    same = {k for k in before if not k.startswith('unet/')}
    assert {k: after[k] for k in same} == {k: before[k] for k in same}
    plain, fused = (load_file(next((d/'unet').glob('*.safetensors'))) for d in (base, tmp_path/'out'))
    assert plain.keys() == fused.keys()
    moved = {k for k in plain if not torch.equal(plain[k], fused[k])}
    assert moved and all(any(t in k for t in ('to_q', 'to_k', 'to_v', 'to_out.0')) for k in moved)

def test_weights_keep_the_variant_and_half_precision(tmp_path):
    base, pipe = tiny(tmp_path)
    half = load_pipeline(base, 'float16')
    half.save_pretrained(tmp_path/'half', variant='fp16', safe_serialization=True)
    (tmp_path/'half'/'origin.json').write_text(json.dumps(dict(kind='hub', repo='a/b', revision='', variant='fp16')))
    write_adapted(tmp_path/'half', pipe.unet, tmp_path/'out')
    weights, = (tmp_path/'out'/'unet').glob('*.safetensors')
    assert weights.name.endswith('.fp16.safetensors')
    assert {v.dtype for v in load_file(weights).values()} == {torch.float16}
    assert (outputs(pipe)-outputs(load_pipeline(tmp_path/'out'))).abs().max() < .05
    pipe.unet.to(torch.bfloat16)
    base16 = load_pipeline(base)
    base16.to(dtype=torch.bfloat16).save_pretrained(tmp_path/'bf', safe_serialization=True)
    write_adapted(tmp_path/'bf', pipe.unet, tmp_path/'wide')          # small additions would be lost in bfloat16
    weights, = (tmp_path/'wide'/'unet').glob('*.safetensors')
    assert {v.dtype for v in load_file(weights).values()} == {torch.float32}

def test_training_moves_the_additions_alone(tmp_path):
    "On a real class of pipeline, with noise and not velocity as its target; the error falls."
    from synthscale.adapted import AdaptedSpec, photo_error, train_lora
    pipe = load_pipeline(tiny_sd(tmp_path/'base'))
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), np.uint8)
    photos = ImageSet('p', images, np.arange(6) % 2, None)
    spec = AdaptedSpec(model='base', set='p', prompts='p', rank=4, steps=80, batch_size=8, lr=.01)
    texts = [['zero', 'a photo of the digit zero'], ['one']]
    error = [photo_error(pipe, photos, texts, spec, 0)]
    train_lora(pipe, photos, texts, spec, 0, tmp_path/'state.safetensors')
    error.append(photo_error(pipe, photos, texts, spec, 0))
    after = {k.replace('.base_layer', ''): v for k, v in pipe.unet.state_dict().items() if 'lora_' not in k}
    assert all(torch.equal(after[k], v) for k, v in before.items()) and error[1] < error[0]
    state = load_file(tmp_path/'state.safetensors')
    assert {k.split('.')[0] for k in state} == {'net', 'opt'} and max(v.numel() for v in state.values()) < 1000

def test_photos_are_brought_to_the_size_and_the_channels_of_the_model(tmp_path):
    pipe = load_pipeline(tiny_sd(tmp_path/'base'))
    grey = np.random.default_rng(0).integers(0, 255, (3, 5, 5, 1), np.uint8)
    mean, std = photo_latents(pipe.vae, grey, 8, batch=2)
    assert mean.shape == std.shape == (3, 4, 4, 4)
    assert torch.equal(mean[2:], photo_latents(pipe.vae, grey[2:], 8)[0])
    with pytest.raises(StudyError, match='the photos have 2 channels, and the model.s autoencoder takes 3'):
        photo_latents(pipe.vae, np.zeros((1, 8, 8, 2), np.uint8), 8)

def test_the_error_is_that_of_a_plain_calculation(tmp_path):
    from diffusers import DDPMScheduler
    pipe = load_pipeline(tiny_sd(tmp_path/'base'))
    z, ids = torch.randn(5, 4, 4, 4), torch.zeros(5, 16, dtype=int)
    with torch.no_grad():
        found = [float(noise_error(pipe, z, ids, torch.Generator().manual_seed(3), g)) for g in (None, 5.)]
        g = torch.Generator().manual_seed(3)
        t, noise = torch.randint(0, 1000, (5,), generator=g), torch.randn(z.shape, generator=g)
        a = DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod[t]
        noisy = a.sqrt().view(-1, 1, 1, 1)*z+(1-a).sqrt().view(-1, 1, 1, 1)*noise
        out = pipe.unet(noisy, t, pipe.text_encoder(ids)[0]).sample
        each = (out-noise).square().mean((1, 2, 3))
    weights = torch.minimum(a/(1-a), torch.tensor(5.))*(1-a)/a
    assert np.allclose(found, [float(each.mean()), float((each*weights).mean())], rtol=1e-4)

# ---- kills

KILLED = """
import synthscale.adapted as adapted
adapted._EVERY = 0.
from synthscale.study import Study
adapted.adapt_model(Study('.'), 'by_hand')
"""

@pytest.mark.slow
def test_a_killed_run_continues_and_ends_with_the_same_bytes(study, tmp_path):
    p = copy.deepcopy(study.raw)
    p['adapted']['by_hand'] |= dict(steps=150, checked=0)
    for n in ('sets', 'models', 'runs'):
        subprocess.run(['cp', '-r', str(study.path(n)), str(tmp_path/n)], check=True)
    dump(p, tmp_path/'params.yaml')
    env = environment() | {'PYTHONPATH': str(ROOT)}
    child = subprocess.Popen([sys.executable, '-c', KILLED], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
    end, found = time.monotonic()+WAIT, []
    while not found and time.monotonic() < end and child.poll() is None:
        found = list(tmp_path.glob('build/adapted/*/lora.safetensors'))
        time.sleep(.05)
    time.sleep(.5)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and found
    s = Study(tmp_path)
    from safetensors import safe_open
    with safe_open(found[0], 'pt') as f:
        assert 0 < int(f.metadata()['step']) < 150
    a = files(adapt_model(s, 'by_hand'))
    assert not list(tmp_path.glob('build/adapted/*'))
    for path in (tmp_path/'models'/'by_hand', tmp_path/'runs'/'models'/'by_hand.json'):
        subprocess.run(['rm', '-r', str(path)], check=True)
    assert files(adapt_model(s, 'by_hand')) == a

# ---- copies, and use as a model

def test_near_copies_among_its_images_are_counted(study):
    photos, pipe = training_photos(study, 'by_hand'), load_pipeline(study.path('models', 'by_hand'))
    texts, spec = [['zero'], ['one']], changed(study, checked=4).adapted['by_hand']
    n, drawn = drawn_copies(pipe, photos, texts, spec, 0, 3)
    assert n == 0 and len({a.tobytes() for a in drawn}) == 4
    known = ImageSet('k', np.stack([drawn[1], drawn[3], *photos.images[:3]]), np.zeros(5, int), None)
    assert drawn_copies(pipe, known, texts, spec, 0, 3)[0] == 2
    assert drawn_copies(pipe, photos, texts, changed(study, checked=0).adapted['by_hand'], 0, 3)[0] == 0

def test_a_source_of_an_adapted_model_is_generated_and_a_changed_file_is_found(study):
    generate_source(study, 'hand_g2', workers=1)
    m = read_manifest(study.set_dir('hand_g2'))
    assert set(m.model) == {'by_hand'} and len(m) == 40
    assert set(m.model_sha256) == {Source(study, 'hand_g2').recipe['model_sha256']}
    card = adapted_card(study, 'by_hand').set_index('split')
    assert card.index.tolist() == ['train', 'val'] and card.trained_on.tolist() == [True, False]
    assert (card.adapted < card.before).all()
    file = study.path('models', 'by_hand', 'adapted.json')
    text = file.read_text()
    file.unlink()                                       # a link to it may be elsewhere
    file.write_text(text+' ')
    with pytest.raises(StudyError, match="'dvc repro adapted@by_hand' makes it again"):
        Source(study, 'hand_g2')
    file.write_text(text)
    Source(study, 'hand_g2')

def test_another_kind_of_model_is_refused_when_it_is_there(study, tmp_path):
    p = copy.deepcopy(study.raw)
    p['models']['xl'] = dict(type='local', input='xl')
    p['adapted']['by_hand']['model'] = 'xl'
    s = Study(study.dir, p)
    tiny_sdxl(study.path('models', 'xl'))
    with pytest.raises(StudyError, match="adapted.by_hand.model is 'xl': expected a StableDiffusionPipeline"):
        adapt_model(s, 'by_hand')

def test_a_missing_library_is_named(tmp_path, monkeypatch):
    pipe = load_pipeline(tiny_sd(tmp_path/'base'))
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(StudyError, match=r"pip install 'synthscale\[lora\]'"):
        add_lora(pipe.unet, 2, 0)

def test_the_arithmetic_is_counted_without_weights(tmp_path):
    "A step with its backward pass costs more than twice a forward pass of attention and convolutions, at most thrice."
    from torch.utils.flop_counter import FlopCounterMode
    pipe = load_pipeline(tiny_sd(tmp_path/'base'))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        pipe.unet(torch.zeros(1, 4, 4, 4), torch.zeros(1).long(), torch.zeros(1, 16, 16))
    flops, learned, total = step_flops(dict(pipe.unet.config), 3, 16)
    assert 1.5*forward.get_total_flops() < flops < 3.2*forward.get_total_flops()
    assert total == sum(p.numel() for p in pipe.unet.parameters())
    assert learned == sum(p.numel() for p in add_lora(pipe.unet, 3, 0))

# ---- params.yaml

def wrong(change):
    "What is said of a changed params.yaml."
    p = with_adapted(smoke_params())
    change(p)
    return '\n'.join(problems(Study('.', p)))

@pytest.mark.parametrize('change, words', [
    (lambda p: None, ''),
    (lambda p: p['adapted']['by_hand'].update(model='mini_ssd'), "did you mean 'mini_sd'?"),
    (lambda p: p['adapted']['by_hand'].update(model='mini_muse'), 'a StableDiffusionPipeline, and this one is a mini_'),
    (lambda p: p['adapted']['by_hand'].update(set='names_g2'), "no such set under data.sets"),
    (lambda p: p['adapted']['by_hand'].update(prompts='name'), "did you mean 'names'?"),
    (lambda p: p['adapted']['by_hand'].update(guidance_scale=.5), 'adapted.by_hand.guidance_scale is 0.5'),
    (lambda p: p['adapted'].update(mini_sd=p['adapted']['by_hand']), 'it is under models, too'),
    (lambda p: p['generate']['sources']['hand_g2'].update(model='by_hnd'), "did you mean 'by_hand'?"),
    (lambda p: p['generate']['sources']['hand_g2'].update(guidance_scale=.5), 'expected a finite number from 1 on'),
    (lambda p: p['adapted']['by_hand'].update(model='by_hand'), 'no such model under models'),
])
def test_what_cannot_be_is_named(change, words):
    found = wrong(change)
    assert words in found and bool(found) == bool(words), found

def test_a_study_with_an_adapted_model_has_all_its_parameters():
    out = resolved(Study('.', with_adapted(smoke_params())))
    assert out['adapted']['by_hand']['snr_gamma'] == 5 and out['generate']['sources']['hand_g2']['model'] == 'by_hand'

# ---- DVC

@pytest.mark.slow
def test_dvc_adapts_and_generates_and_again_when_the_photos_change(repo):
    "The finished study gets an adapted model and a source of it; other models and sets are left as they are."
    one = with_adapted(smoke_params())
    def add(p):
        p['adapted'] = {'by_hand': one['adapted']['by_hand'] | dict(steps=20, checked=4)}
        p['generate']['sources']['hand_g2'] = one['generate']['sources']['hand_g2'] | dict(curve={})
    edit(repo, add)
    made = ran(sh('dvc repro generate@hand_g2', repo))
    assert made == {'prepare', 'adapted@by_hand', 'generate@hand_g2'}
    m = pd.read_parquet(repo/'sets'/'hand_g2'/'manifest.parquet')
    note = json.loads((repo/'models'/'by_hand'/'adapted.json').read_text())
    assert set(m.model) == {'by_hand'} and note['drawn'] == 4 and note['photos'] == 847
    assert ran(sh('dvc repro generate@hand_g2', repo)) == set()
    edit(repo, lambda p: p['adapted']['by_hand'].update(steps=21))
    assert ran(sh('dvc repro generate@hand_g2', repo)) == {'prepare', 'adapted@by_hand', 'generate@hand_g2'}
    assert 'adapted@by_hand' in load(repo/'dvc.lock')['stages']
