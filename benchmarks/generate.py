"""Generating images: this engine against plain diffusers, and Ray workers against plain processes.
Prints one JSON line for each part.

    python benchmarks/generate.py [cpu|ray|gpu] [--images 1000]

cpu: the embedded study's mini_sd (dvc pull models@mini_sd), one thread per side; every side writes its images.
ray: two Ray workers against two plain processes on two cores, in turn; rates count from the first batch on disk, wall
times from the start.
gpu: architectures of the hub's models with random weights in bf16, against diffusers' own ways; needs a GPU. With
--tiny it runs its code on the smallest networks, on any machine, and its numbers mean nothing.
"""
import argparse, json, os, shutil, subprocess, sys, tempfile, threading, time
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np, torch
from importlib.metadata import version
from PIL import Image
from ruamel.yaml import YAML
from synthscale.generate import Source, generate_shard, images_there
from synthscale.params import check_study
from synthscale.pipelines import Sampler, load_pipeline, quiet
from synthscale.study import Study
from synthscale.workers import generate_shards

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = {k: version(k) for k in ('torch', 'diffusers', 'transformers')} | {'python': sys.version.split()[0]}

def study(images, compile='no', shard_size=1000, batch_size=250, steps=12, guidance=2.):
    "The embedded study in a temporary folder with one source, sampled from the model that is already here."
    d = Path(tempfile.mkdtemp(prefix='synthscale-bench-'))
    p = YAML(typ='safe').load((ROOT/'params.yaml').read_text())
    p['data']['shard_size'] = shard_size
    source = dict(model='mini_sd', prompts='templates', guidance_scale=guidance, n_images=images, steps=steps)
    p['generate'].update(batch_size=batch_size, compile=compile, sources={'bench': source})
    p['quality']['sets'], p['laws'], p['report'] = {}, {}, {}
    p['classify'] |= dict(curves={'mnist': p['classify']['curves']['mnist']}, mixtures={})
    with open(d/'params.yaml', 'w') as f:
        YAML().dump(p, f)
    (d/'models').symlink_to(ROOT/'models')
    (d/'data').symlink_to(ROOT/'data')
    (d/'prompts').symlink_to(ROOT/'prompts')
    (d/'sets').mkdir()
    (d/'runs').mkdir()
    (d/'runs'/'prompts').symlink_to(ROOT/'runs'/'prompts')
    return check_study(Study(d))

def write(images, keys, folder):
    "What a careful loop writes: one PNG per image."
    for a, k in zip(images, keys):
        Image.fromarray((a[..., 0]*255).round().astype(np.uint8)).save(folder/f'{k}.png', optimize=True)

def plain(s, n, batch):
    """Seconds that `pipe(list)` takes for n images with one generator per image, batches of `batch`;
    batch 0: a loop of pipe(prompt)."""
    src, out = Source(s, 'bench'), Path(tempfile.mkdtemp())
    pipe, rows = load_pipeline(src.model), src.rows(0)[:n]
    kw = dict(num_inference_steps=src.how.steps, guidance_scale=src.how.guidance_scale, output_type='np')
    def sample(rows):
        generators = [torch.Generator().manual_seed(int(x)) for x in rows.seed]
        if batch: return pipe(rows.prompt.tolist(), generator=generators, **kw).images
        return pipe(rows.prompt.iloc[0], generator=generators[0], **kw).images
    sample(rows[:max(1, batch)])                                       # warm
    began = time.perf_counter()
    for i in range(0, n, batch or 1):
        r = rows[i:i+(batch or 1)]
        write(sample(r), r.key, out)
    return time.perf_counter()-began

def ours(s, measure_networks=False):
    """Seconds that the engine takes for all images of the source, the share of them spent in the networks, and the
    seconds of the first, compiling pass."""
    src = Source(s, 'bench')
    sampler = Sampler(src.model, src.how, src.texts, src.batch_size)
    rows = src.rows(0)[:src.batch_size]
    began = time.perf_counter()
    sampler.sample(rows.prompt.tolist(), rows.seed.tolist())
    first = time.perf_counter()-began
    sampler.groups, sampler.negative = {}, None                      # prompts are encoded within the time measured
    inside = [0.]
    if measure_networks:
        def timed(f):
            def g(*a, **k):
                t = time.perf_counter()
                out = f(*a, **k)
                inside[0] += time.perf_counter()-t
                return out
            return g
        for net in (sampler.pipe.text_encoder, sampler.pipe.unet):
            net.forward = timed(net.forward)
        sampler.pipe.vae.decode = timed(sampler.pipe.vae.decode)
    shutil.rmtree(src.folder, ignore_errors=True)
    began = time.perf_counter()
    for shard in src.shards:
        generate_shard(src, shard, lambda: sampler)
    return (t := time.perf_counter()-began), inside[0]/t, first

def cpu(n):
    "The engine against pipe(list) and pipe(prompt), alternating, best of three."
    s, c = study(n), study(n, compile='default')
    torch.set_num_threads(1)
    all_s = dict(engine=[], pipe_list=[], compiled=[])
    for _ in range(3):
        all_s['pipe_list'].append(plain(s, n, 250))
        all_s['engine'].append(ours(s)[0])
    share = ours(s, True)[1]
    loop, first = plain(s, 40, 0)/40*n, 0
    for _ in range(3):
        t, _, f = ours(c)
        all_s['compiled'].append(t)
        first = max(first, f)
    engine, lists, compiled = (min(ts) for ts in all_s.values())
    return dict(
        benchmark='generate_cpu', model='mini_sd', images=n, batch_size=250, steps=12, guidance_scale=2., size=8,
        threads=1, cores=os.cpu_count(), **VERSIONS, engine_s=round(engine, 2), pipe_list_s=round(lists, 2),
        pipe_loop_s=round(loop, 1), compiled_s=round(compiled, 2), compile_s=round(first-compiled/(n/250), 1),
        images_per_s=round(n/engine, 1), share_in_networks=round(share, 4), ratio_to_pipe_list=round(lists/engine, 3),
        ratio_to_pipe_loop=round(loop/engine, 2), ratio_compiled=round(lists/compiled, 3),
        all_s={k: [round(t, 2) for t in ts] for k, ts in all_s.items()})

def processes(s, ranges):
    "Generate shards by one plain process per range; wall seconds."
    generate = [sys.executable, '-m', 'synthscale.run', 'generate-shards', 'bench', '--workers', '1', '--shards']
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    where = dict(cwd=s.dir, env=os.environ | {'PYTHONPATH': str(ROOT)})
    began = time.perf_counter()
    ps = [subprocess.Popen([*generate, r], **where, **silent) for r in ranges]
    assert not any(p.wait() for p in ps)
    return time.perf_counter()-began

def steady(s, start):
    "Wall seconds of `start()`, and images per second from the first batch on disk to the end."
    src, seen, over = Source(s, 'bench'), [], threading.Event()
    def watch():
        while not over.wait(.05):
            n = images_there(src, src.shards)
            if n and (not seen or n != seen[-1][1]):
                seen.append((time.perf_counter(), n))
    t = threading.Thread(target=watch)
    t.start()
    began = time.perf_counter()
    start()
    wall = time.perf_counter()-began
    over.set()
    t.join()
    (t0, n0), (t1, n1) = seen[0], seen[-1]
    return wall, (n1-n0)/(t1-t0)

def ray_(n):
    """Two Ray workers against two plain processes, three times in turn, and one process; the same shards, one thread
    per worker."""
    half = n//500//2
    ways = dict(
        processes_2=lambda s: processes(s, [f'0:{half}', f'{half}:{n//500}']),
        ray_2=lambda s: generate_shards(Source(s, 'bench'), None, 2),
        process_1=lambda s: processes(s, ['']))
    walls, rates = ({k: [] for k in ways} for _ in range(2))
    for name in ['processes_2', 'ray_2']*3+['process_1']:
        s = study(n, shard_size=500, batch_size=125)
        wall, per_s = steady(s, lambda: ways[name](s))
        walls[name].append(round(wall, 1))
        rates[name].append(per_s)
    pairs = [a/b-1 for a, b in zip(rates['processes_2'], rates['ray_2'])]
    return dict(
        benchmark='generate_ray', model='mini_sd', images=n, shard_size=500, batch_size=125, steps=12,
        cores=os.cpu_count(), threads_a_worker=1, ray=version('ray'), **VERSIONS, wall_s=walls,
        images_per_s={k: [round(r, 1) for r in v] for k, v in rates.items()},
        overhead_of_ray_by_pair=[round(x, 3) for x in pairs], overhead_of_ray_median=round(float(np.median(pairs)), 4),
        speedup_of_two=round(float(np.median(rates['ray_2'])/rates['process_1'][0]), 3))

# ---- GPU: architectures of the hub's models, random weights

SMALL_CLIP = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)

def clip_ends(tok):
    "What the text encoders of all three share."
    return dict(max_position_embeddings=77, vocab_size=49408, eos_token_id=tok.eos_token_id,
                bos_token_id=tok.bos_token_id)

def sd_vae(**kw):
    "Stable Diffusion's autoencoder."
    import diffusers as D
    return D.AutoencoderKL(3, 3, ('DownEncoderBlock2D',)*4, ('UpDecoderBlock2D',)*4, (128, 256, 512, 512), 2,
                           latent_channels=4, **kw)

def sd15(folder, tiny):
    "Stable Diffusion 1.5, by the sizes of its published configuration."
    import diffusers as D, transformers as T
    from synthscale.random_pipelines import clip_tokenizer, tiny_sd
    if tiny: return tiny_sd(folder)
    torch.manual_seed(0)
    tok = clip_tokenizer(77)
    text = T.CLIPTextModel(T.CLIPTextConfig(**SMALL_CLIP, **clip_ends(tok)))
    unet = D.UNet2DConditionModel(64, 4, 4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
                                  cross_attention_dim=768, attention_head_dim=8)
    scheduler = D.DPMSolverMultistepScheduler(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012)
    pipe = D.StableDiffusionPipeline(
        vae=sd_vae(sample_size=512), text_encoder=text, tokenizer=tok, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.to(torch.bfloat16).save_pretrained(folder)
    return Path(folder)

def sdxl(folder, tiny):
    "SDXL's base model."
    import diffusers as D, transformers as T
    from synthscale.random_pipelines import clip_tokenizer, tiny_sdxl
    if tiny: return tiny_sdxl(folder)
    torch.manual_seed(0)
    tok = clip_tokenizer(77)
    one = T.CLIPTextModel(T.CLIPTextConfig(**SMALL_CLIP, **clip_ends(tok)))
    two = T.CLIPTextModelWithProjection(T.CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
        **clip_ends(tok)))
    unet = D.UNet2DConditionModel(
        128, 4, 4, block_out_channels=(320, 640, 1280), layers_per_block=2,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
        transformer_layers_per_block=[1, 2, 10], attention_head_dim=[5, 10, 20], cross_attention_dim=2048,
        use_linear_projection=True, addition_embed_type='text_time', addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816)
    pipe = D.StableDiffusionXLPipeline(
        vae=sd_vae(sample_size=1024, force_upcast=False), text_encoder=one, text_encoder_2=two, tokenizer=tok,
        tokenizer_2=tok, unet=unet, scheduler=D.EulerDiscreteScheduler(), add_watermarker=False)
    pipe.to(torch.bfloat16).save_pretrained(folder)
    return Path(folder)

def amused(folder, tiny):
    "aMUSEd 512, by the defaults of its classes."
    import diffusers as D, transformers as T
    from synthscale.random_pipelines import clip_tokenizer, tiny_amused
    if tiny: return tiny_amused(folder)
    torch.manual_seed(0)
    tok = clip_tokenizer(77)
    text = T.CLIPTextModelWithProjection(T.CLIPTextConfig(**SMALL_CLIP, projection_dim=768, **clip_ends(tok)))
    net = D.UVit2DModel(sample_size=32, downsample=True, upsample=True)
    codes = D.VQModel(
        3, 3, ('DownEncoderBlock2D',)*5, ('UpDecoderBlock2D',)*5, (128, 256, 256, 512, 768), 2, latent_channels=64,
        num_vq_embeddings=8192, vq_embed_dim=64, lookup_from_codebook=True, mid_block_add_attention=False,
        force_upcast=True, sample_size=32)
    pipe = D.AmusedPipeline(codes, tok, text, net, D.AmusedScheduler(mask_token_id=8255))
    pipe.to(torch.bfloat16).save_pretrained(folder)
    return Path(folder)

def matrix_rate(device):
    "The rate of bf16 matrix products that this chip reaches, in TFLOP/s."
    n = 8192 if device == 'cuda' else 512
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    sync(device)
    t = time.perf_counter()
    for _ in range(20):
        a @ a
    sync(device)
    return 20*2*n**3/(time.perf_counter()-t)/1e12

def sync(device):
    if device == 'cuda':
        torch.cuda.synchronize()

def rate(call, batch, device, repeats=3):
    "Images per second of a call that generates a batch, and the seconds of its first call."
    t = time.perf_counter()
    call()
    sync(device)
    first = time.perf_counter()-t
    call()
    sync(device)
    t = time.perf_counter()
    for _ in range(repeats):
        call()
    sync(device)
    return repeats*batch/(time.perf_counter()-t), first

def documented_way(pipe, mode):
    """A pipeline as diffusers' documentation, 'Accelerate inference', advises: bf16, channels_last, fused projections,
    denoiser and decoder compiled."""
    net = 'unet' if hasattr(pipe, 'unet') else 'transformer'
    getattr(pipe, net).to(memory_format=torch.channels_last)
    if hasattr(pipe, 'vae'):
        pipe.vae.to(memory_format=torch.channels_last)
        pipe.fuse_qkv_projections()
        pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode)
    setattr(pipe, net, torch.compile(getattr(pipe, net), mode=mode, fullgraph=False))
    return pipe

def gpu(tiny, name='sd15', batch=16, steps=30, size=512, guidance=2.):
    """The engine against diffusers' batched default and its documented fast path, same weights, seeds, steps and
    scheduler."""
    from types import SimpleNamespace
    from synthscale.pipelines import sampling_settings
    from torch.utils.flop_counter import FlopCounterMode
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu' and not tiny:
        sys.exit('no GPU here; --tiny runs the code without one')
    quiet()
    if tiny:
        batch, steps, size = 2, 2, None
    folder = dict(sd15=sd15, sdxl=sdxl, amused=amused)[name](Path(tempfile.mkdtemp())/name, tiny)
    words = [f'a photo of the digit {w}' for w in 'zero one two three four five six seven eight nine'.split()]
    prompts, seeds = [words[i % 10] for i in range(batch)], list(range(batch))
    def call_of(pipe):
        def call():
            generators = [torch.Generator('cpu').manual_seed(s) for s in seeds]
            return pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators,
                        output_type='np', height=size, width=size)
        return call
    dtype = 'bfloat16' if device == 'cuda' else 'float32'
    default = load_pipeline(folder, dtype).to(device)
    count = FlopCounterMode(display=False)
    with count:
        call_of(default)()
    base, _ = rate(call_of(default), batch, device)
    mode = 'max-autotune' if device == 'cuda' else 'default'
    fast = documented_way(load_pipeline(folder, dtype).to(device), mode)
    documented, documented_first = rate(call_of(fast), batch, device)
    del fast
    g = SimpleNamespace(dtype=dtype, channels_last=True, compile=mode)
    source = SimpleNamespace(guidance_scale=guidance, steps=steps, scheduler='', size=size, safety_checker=False,
                             upscale=None)
    how = sampling_settings(folder, g, source)
    sampler = Sampler(folder, how, words, batch)
    engine, first = rate(lambda: sampler.sample(prompts, seeds), batch, device)
    peak, needed = matrix_rate(device), count.get_total_flops()/batch/1e12          # TFLOP/s; TFLOP per image
    return dict(
        benchmark='generate_gpu', tiny=tiny, model=name,
        device=torch.cuda.get_device_name() if device == 'cuda' else 'cpu', batch_size=batch, steps=steps, size=size,
        guidance_scale=guidance, dtype=dtype, **VERSIONS,
        images_per_s=dict(default=round(base, 3), documented=round(documented, 3), engine=round(engine, 3)),
        first_call_s=dict(documented=round(documented_first, 1), engine=round(first, 1)),
        ratio_to_default=round(engine/base, 3), ratio_to_documented=round(engine/documented, 3),
        TFLOP_an_image=round(needed, 4), measured_matrix_TFLOP_s=round(peak, 1),
        share_of_matrix_rate=round(needed*engine/peak, 3))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('part', nargs='?', default='cpu', choices=['cpu', 'ray', 'gpu'])
    p.add_argument('--images', type=int, default=1000)
    p.add_argument('--tiny', action='store_true')
    a = p.parse_args()
    if a.part == 'cpu':
        print(json.dumps(cpu(a.images)))
    elif a.part == 'ray':
        print(json.dumps(ray_(a.images)))
    else:
        for name, size in (('sd15', 512), ('sdxl', 1024), ('amused', 512)):
            print(json.dumps(gpu(a.tiny, name, size=size)), flush=True)
