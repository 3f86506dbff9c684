"""Drawing images: this engine against plain diffusers, and Ray workers against plain processes. Prints one JSON line for each part.

    python benchmarks/generate.py [cpu|ray|gpu] [--images 1000]

cpu: the embedded study's mini_sd (dvc pull models@mini_sd), one thread a side; every side writes its images. ray: two Ray workers against two plain processes on two cores, in turn; rates count from the first batch on disk, wall times all.
gpu: architectures of the hub's models with random weights in bf16, against diffusers' own ways; needs a GPU. With --tiny it runs its code on the smallest networks, on any machine, and its numbers mean nothing.
"""
import argparse, json, os, shutil, subprocess, sys, tempfile, threading, time
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np, torch
from importlib.metadata import version
from PIL import Image
from ruamel.yaml import YAML
from synthscale.generate import Painter, Source, draw_shard, draw_source, images_there
from synthscale.pipelines import load_pipeline, quiet
from synthscale.study import Study

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = {k: version(k) for k in ('torch', 'diffusers', 'transformers')} | {'python': sys.version.split()[0]}

def study(images, compile='no', shard_size=1000, batch_size=250, steps=12, guidance=2.):
    "The embedded study in a temporary folder with one source, drawn from the model that is already here."
    d = Path(tempfile.mkdtemp(prefix='synthscale-bench-'))
    p = YAML(typ='safe').load((ROOT/'params.yaml').read_text())
    p['data']['shard_size'] = shard_size
    p['generate'].update(batch_size=batch_size, compile=compile, sources={'bench': dict(model='mini_sd', prompts='styles', guidance_scale=guidance, n_images=images, steps=steps)})
    p['quality']['sources'], p['laws'], p['report'] = {}, dict(fit_range={}), dict(scaling=[])
    p['classify']['curves'] = {'real': p['classify']['curves']['real']}
    with open(d/'params.yaml', 'w') as f: YAML().dump(p, f)
    (d/'models').symlink_to(ROOT/'models'); (d/'data').symlink_to(ROOT/'data'); (d/'sets').mkdir(); (d/'runs').mkdir()
    (d/'runs'/'prompts').symlink_to(ROOT/'runs'/'prompts')
    return Study(d)

def write(images, keys, folder):
    "What a careful loop writes: a PNG an image."
    for a, k in zip(images, keys): Image.fromarray((a[..., 0]*255).round().astype(np.uint8)).save(folder/f'{k}.png', optimize=True)

def plain(s, n, batch):
    "Seconds that `pipe(list)` takes for n images with one generator an image, batches of `batch`; batch 0: a loop of pipe(prompt)."
    src, out = Source(s, 'bench'), Path(tempfile.mkdtemp())
    pipe, rows = load_pipeline(src.model), src.rows(0)[:n]
    kw = dict(num_inference_steps=src.how.steps, guidance_scale=src.how.guidance_scale, output_type='np')
    gen = lambda seeds: [torch.Generator().manual_seed(int(x)) for x in seeds]
    pipe(rows.prompt[:max(1, batch)].tolist(), generator=gen(rows.seed[:max(1, batch)]), **kw)      # warm
    began = time.perf_counter()
    for i in range(0, n, batch or 1):
        r = rows[i:i+(batch or 1)]
        images = pipe(r.prompt.tolist() if batch else r.prompt.iloc[0], generator=gen(r.seed) if batch else gen(r.seed)[0], **kw).images
        write(images, r.key, out)
    return time.perf_counter()-began

def ours(s, measure_networks=False):
    "Seconds that the engine takes for all images of the source, the share of them spent in the networks, and the seconds of the first, compiling pass."
    src = Source(s, 'bench')
    painter = Painter(src.model, src.how, src.texts, src.batch_size)
    rows = src.rows(0)[:src.batch_size]
    began = time.perf_counter(); painter.draw(rows.prompt.tolist(), rows.seed.tolist()); first = time.perf_counter()-began
    painter.groups, painter.negative = {}, None                      # prompts are encoded within the time measured
    inside = [0.]
    if measure_networks:
        def timed(f):
            def g(*a, **k):
                t = time.perf_counter(); out = f(*a, **k); inside[0] += time.perf_counter()-t
                return out
            return g
        for net in (painter.pipe.text_encoder, painter.pipe.unet): net.forward = timed(net.forward)
        painter.pipe.vae.decode = timed(painter.pipe.vae.decode)
    shutil.rmtree(src.folder, ignore_errors=True)
    began = time.perf_counter()
    for shard in src.shards: draw_shard(src, shard, lambda: painter)
    return (t := time.perf_counter()-began), inside[0]/t, first

def cpu(n):
    "The engine against pipe(list) and pipe(prompt), alternating, best of three."
    s, c = study(n), study(n, compile='default')
    torch.set_num_threads(1)
    lists, engine, shares, compiled = [], [], [], []
    first = compile_s = 0
    for _ in range(3):
        lists.append(plain(s, n, 250))
        t, _, first = ours(s); engine.append(t)
    shares.append(ours(s, True)[1])
    loop = plain(s, 40, 0)/40*n
    for k in range(3):
        t, _, f = ours(c); compiled.append(t)
        compile_s = max(compile_s, f)
    best = min
    return dict(benchmark='generate_cpu', model='mini_sd', images=n, batch_size=250, steps=12, guidance_scale=2., size=8, threads=1, cores=os.cpu_count(), **VERSIONS, engine_s=round(best(engine), 2), pipe_list_s=round(best(lists), 2),
                pipe_loop_s=round(loop, 1), compiled_s=round(best(compiled), 2), compile_s=round(compile_s-min(compiled)/(n/250), 1), images_per_s=round(n/best(engine), 1), share_in_networks=round(shares[0], 4),
                ratio_to_pipe_list=round(best(lists)/best(engine), 3), ratio_to_pipe_loop=round(loop/best(engine), 2), ratio_compiled=round(best(lists)/best(compiled), 3), all_s=dict(engine=[round(x, 2) for x in engine], pipe_list=[round(x, 2) for x in lists], compiled=[round(x, 2) for x in compiled]))

def processes(s, ranges):
    "Draw shards by one plain process a range; wall seconds."
    began = time.perf_counter()
    ps = [subprocess.Popen([sys.executable, '-m', 'synthscale.run', 'draw', 'bench', '--workers', '1', '--shards', r], cwd=s.dir, env=os.environ | {'PYTHONPATH': str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for r in ranges]
    assert not any(p.wait() for p in ps)
    return time.perf_counter()-began

def steady(s, start):
    "Images a second from the first batch on disk to the end, while `start()` runs."
    src, seen, over = Source(s, 'bench'), [], threading.Event()
    def watch():
        while not over.wait(.05):
            n = images_there(src, src.shards)
            if n and (not seen or n != seen[-1][1]): seen.append((time.perf_counter(), n))
    t = threading.Thread(target=watch); t.start()
    began = time.perf_counter(); start(); wall = time.perf_counter()-began
    over.set(); t.join()
    (t0, n0), (t1, n1) = seen[0], seen[-1]
    return wall, (n1-n0)/(t1-t0)

def ray_(n):
    "Two Ray workers against two plain processes, three times in turn, and one process; the same shards, one thread a worker."
    half = n//500//2
    ways = dict(processes_2=lambda s: processes(s, [f'0:{half}', f'{half}:{n//500}']), ray_2=lambda s: draw_source(Source(s, 'bench'), None, 2))
    rows = {k: [] for k in (*ways, 'process_1')}
    def run(name, how):
        s = study(n, shard_size=500, batch_size=125)
        rows[name].append(steady(s, lambda: how(s)))
    for _ in range(3):
        for name, how in ways.items(): run(name, how)
    run('process_1', lambda s: processes(s, ['']))
    rates = {k: [v[1] for v in vs] for k, vs in rows.items()}
    pairs = [a/b-1 for a, b in zip(rates['processes_2'], rates['ray_2'])]
    return dict(benchmark='generate_ray', model='mini_sd', images=n, shard_size=500, batch_size=125, steps=12, cores=os.cpu_count(), threads_a_worker=1, ray=version('ray'), **VERSIONS, wall_s={k: [round(v[0], 1) for v in vs] for k, vs in rows.items()},
                images_per_s={k: [round(r, 1) for r in v] for k, v in rates.items()}, overhead_of_ray_by_pair=[round(x, 3) for x in pairs], overhead_of_ray_median=round(float(np.median(pairs)), 4), speedup_of_two=round(float(np.median(rates['ray_2'])/rates['process_1'][0]), 3))

# ---- GPU: architectures of the hub's models, random weights

def sd15(folder, tiny):
    "Stable Diffusion 1.5, by the sizes of its published configuration."
    import diffusers as D, transformers as T
    from synthscale.tiny import clip_tokenizer, tiny_sd
    if tiny: return tiny_sd(folder)
    torch.manual_seed(0); tok = clip_tokenizer(77)
    text = T.CLIPTextModel(T.CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=77, eos_token_id=tok.eos_token_id, bos_token_id=tok.bos_token_id))
    unet = D.UNet2DConditionModel(64, 4, 4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768, attention_head_dim=8)
    vae = D.AutoencoderKL(3, 3, ('DownEncoderBlock2D',)*4, ('UpDecoderBlock2D',)*4, (128, 256, 512, 512), 2, latent_channels=4, sample_size=512)
    pipe = D.StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=tok, unet=unet, scheduler=D.DPMSolverMultistepScheduler(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.to(torch.bfloat16).save_pretrained(folder)
    return Path(folder)

def sdxl(folder, tiny):
    "SDXL's base model."
    import diffusers as D, transformers as T
    from synthscale.tiny import clip_tokenizer, tiny_sdxl
    if tiny: return tiny_sdxl(folder)
    torch.manual_seed(0); tok = clip_tokenizer(77)
    ends = dict(max_position_embeddings=77, vocab_size=49408, eos_token_id=tok.eos_token_id, bos_token_id=tok.bos_token_id)
    one = T.CLIPTextModel(T.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **ends))
    two = T.CLIPTextModelWithProjection(T.CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280, **ends))
    unet = D.UNet2DConditionModel(128, 4, 4, block_out_channels=(320, 640, 1280), layers_per_block=2, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
                                  transformer_layers_per_block=[1, 2, 10], attention_head_dim=[5, 10, 20], cross_attention_dim=2048, use_linear_projection=True, addition_embed_type='text_time', addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
    vae = D.AutoencoderKL(3, 3, ('DownEncoderBlock2D',)*4, ('UpDecoderBlock2D',)*4, (128, 256, 512, 512), 2, latent_channels=4, sample_size=1024, force_upcast=False)
    pipe = D.StableDiffusionXLPipeline(vae=vae, text_encoder=one, text_encoder_2=two, tokenizer=tok, tokenizer_2=tok, unet=unet, scheduler=D.EulerDiscreteScheduler(), add_watermarker=False)
    pipe.to(torch.bfloat16).save_pretrained(folder)
    return Path(folder)

def amused(folder, tiny):
    "aMUSEd 512, by the defaults of its classes."
    import diffusers as D, transformers as T
    from synthscale.tiny import clip_tokenizer, tiny_amused
    if tiny: return tiny_amused(folder)
    torch.manual_seed(0); tok = clip_tokenizer(77)
    text = T.CLIPTextModelWithProjection(T.CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768, max_position_embeddings=77, eos_token_id=tok.eos_token_id, bos_token_id=tok.bos_token_id))
    net = D.UVit2DModel(sample_size=32, downsample=True, upsample=True)
    codes = D.VQModel(3, 3, ('DownEncoderBlock2D',)*5, ('UpDecoderBlock2D',)*5, (128, 256, 256, 512, 768), 2, latent_channels=64, num_vq_embeddings=8192, vq_embed_dim=64, lookup_from_codebook=True, mid_block_add_attention=False, force_upcast=True, sample_size=32)
    D.AmusedPipeline(codes, tok, text, net, D.AmusedScheduler(mask_token_id=8255)).to(torch.bfloat16).save_pretrained(folder)
    return Path(folder)

def matrix_rate(device):
    "bf16 matrix products a second that this chip reaches, in TFLOP/s."
    n = 8192 if device == 'cuda' else 512
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    for _ in range(3): a @ a
    sync(device); t = time.perf_counter()
    for _ in range(20): a @ a
    sync(device)
    return 20*2*n**3/(time.perf_counter()-t)/1e12

def sync(device):
    if device == 'cuda': torch.cuda.synchronize()

def rate(call, batch, device, repeats=3):
    "Images a second of a call that draws a batch, and the seconds of its first call."
    t = time.perf_counter(); call(); sync(device); first = time.perf_counter()-t
    call(); sync(device)
    t = time.perf_counter()
    for _ in range(repeats): call()
    sync(device)
    return repeats*batch/(time.perf_counter()-t), first

def gpu(tiny, name='sd15', batch=16, steps=30, size=512, guidance=2.):
    "The engine against diffusers' batched default and its documented fast path, same weights, seeds, steps and scheduler."
    from types import SimpleNamespace
    from synthscale.pipelines import drawing, row_scheduler
    from torch.utils.flop_counter import FlopCounterMode
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu' and not tiny: sys.exit('no GPU here; --tiny runs the code without one')
    quiet()
    if tiny: batch, steps, size = 2, 2, None
    folder = dict(sd15=sd15, sdxl=sdxl, amused=amused)[name](Path(tempfile.mkdtemp())/name, tiny)
    words = [f'a photo of the digit {w}' for w in 'zero one two three four five six seven eight nine'.split()]
    prompts, seeds = [words[i % 10] for i in range(batch)], list(range(batch))
    def call_of(pipe):
        gen = lambda: [torch.Generator('cpu').manual_seed(s) for s in seeds]
        return lambda: pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=gen(), output_type='np', height=size, width=size)
    dtype = 'bfloat16' if device == 'cuda' else 'float32'
    default = load_pipeline(folder, dtype).to(device)
    count = FlopCounterMode(display=False)
    with count: call_of(default)()
    base, _ = rate(call_of(default), batch, device)
    fast = load_pipeline(folder, dtype).to(device)                     # diffusers' documentation, 'Accelerate inference': bf16, channels_last, fused projections, compiled denoiser and decoder
    net = 'unet' if hasattr(fast, 'unet') else 'transformer'
    getattr(fast, net).to(memory_format=torch.channels_last)
    if hasattr(fast, 'vae'): fast.vae.to(memory_format=torch.channels_last); fast.fuse_qkv_projections()
    mode = 'max-autotune' if device == 'cuda' else 'default'
    setattr(fast, net, torch.compile(getattr(fast, net), mode=mode, fullgraph=False))
    if hasattr(fast, 'vae'): fast.vae.decode = torch.compile(fast.vae.decode, mode=mode)
    documented, documented_first = rate(call_of(fast), batch, device)
    del fast
    g = SimpleNamespace(dtype=dtype, channels_last=True, compile=mode)
    how = drawing(folder, g, SimpleNamespace(guidance_scale=guidance, steps=steps, scheduler='', size=size, safety_checker=False, upscale=None))
    painter = Painter(folder, how, words, batch)
    engine, first = rate(lambda: painter.draw(prompts, seeds), batch, device)
    peak = matrix_rate(device)
    return dict(benchmark='generate_gpu', tiny=tiny, model=name, device=torch.cuda.get_device_name() if device == 'cuda' else 'cpu', batch_size=batch, steps=steps, size=size, guidance_scale=guidance, dtype=dtype, **VERSIONS,
                images_per_s=dict(default=round(base, 3), documented=round(documented, 3), engine=round(engine, 3)), first_call_s=dict(documented=round(documented_first, 1), engine=round(first, 1)), ratio_to_default=round(engine/base, 3), ratio_to_documented=round(engine/documented, 3),
                TFLOP_an_image=round(count.get_total_flops()/batch/1e12, 4), measured_matrix_TFLOP_s=round(peak, 1), share_of_matrix_rate=round(count.get_total_flops()/batch*engine/1e12/peak, 3))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('part', nargs='?', default='cpu', choices=['cpu', 'ray', 'gpu'])
    p.add_argument('--images', type=int, default=1000)
    p.add_argument('--tiny', action='store_true')
    a = p.parse_args()
    if a.part == 'cpu': print(json.dumps(cpu(a.images)))
    elif a.part == 'ray': print(json.dumps(ray_(a.images)))
    else:
        for name, size in (('sd15', 512), ('sdxl', 1024), ('amused', 512)): print(json.dumps(gpu(a.tiny, name, size=size)), flush=True)
