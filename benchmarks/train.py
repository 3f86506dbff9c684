"""Training: this trainer's loop against a plain timm loop on the same work. Prints one JSON line for each part.

    python benchmarks/train.py [cpu|gpu] [--images 2000] [--steps 120]

cpu: a small ResNet at 32x32; JPEG files, flip and crop, AdamW, one thread for the network. Three sides, alternating,
best of three: our loop; a plain loop with torchvision's ImageFolder, timm's transforms and a DataLoader (two workers,
everything else equal); and our network and optimizer on one constant batch in memory, which is the most that any input
can reach.

gpu: ViT-B/16 at 224 in bf16 on random weights and images; needs a GPU. Our loop against the inner loop of timm's train
script, and the share of the chip's measured matrix rate. With --tiny it runs its code on a small network, on any
machine, and its numbers mean nothing.
"""
import argparse, json, os, sys, tempfile, time
from pathlib import Path
import numpy as np, timm, timm.data, timm.loss, torch
from importlib.metadata import version
from PIL import Image
from synthscale.recipes import Arch, Recipe
from synthscale.train import create_net, create_optimizer, losses, scaled, train_net

VERSIONS = {k: version(k) for k in ('torch', 'torchvision', 'timm', 'accelerate')} | {'python': sys.version.split()[0]}

SMALL = dict(name='resnet18', kwargs=dict(channels=[16, 32, 64, 128], layers=[1, 1, 1, 1]), stem='cifar')

def recipe(batch, **kw):
    plain = dict(reference='benchmark', arch=SMALL, samples_seen_at_100=100, samples_seen_power=1., batch_size=batch,
                 optimizer=dict(name='adamw', lr=1e-3, weight_decay=.05), label_smoothing=.1,
                 augment=dict(flip=True, crop=4))
    return Recipe.model_validate(plain | kw)

def step(opt, loss):
    "One step of an optimizer, as every loop but ours makes it."
    opt.zero_grad()
    loss.backward()
    opt.step()

def files(folder, n, size=32):
    "n smooth random JPEG files in ten class folders, and the same images as an array."
    rng, out = np.random.default_rng(0), []
    for i in range(n):
        path = folder/f'{i % 10}'/f'{i:06d}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)
        out.append((np.asarray(Image.open(path)), i % 10))
    return np.stack([a for a, _ in out]), np.array([c for _, c in out])

def ours(x, y, r, steps):
    "Images per second of train_net; what comes before the first step is left out, as it is on the other sides."
    import synthscale.train as t
    began, real = [], t.losses
    def timed(*a):
        if len(began) < 2:
            began.append(time.perf_counter())
        return real(*a)
    t.losses = timed
    try:
        train_net(create_net(r.arch, 10, 3, 0), x, y, r, r.batch_size*steps, 0)
    finally:
        t.losses = real
    return (steps-1)*r.batch_size/(time.perf_counter()-began[1])

def plain(folder, r, steps):
    "Images per second of ImageFolder, DataLoader and the same network, loss and optimizer."
    from torchvision.datasets import ImageFolder
    from torchvision import transforms as T
    normal = T.Compose([T.RandomHorizontalFlip(), T.RandomCrop(32, padding=r.augment.crop, padding_mode='reflect'),
                        T.ToTensor(), T.Normalize((.5,)*3, (.5,)*3)])
    loader = torch.utils.data.DataLoader(ImageFolder(folder, normal), r.batch_size, shuffle=True, num_workers=2,
                                         drop_last=True, persistent_workers=True)
    net = create_net(r.arch, 10, 3, 0).train()
    opt, done, began = create_optimizer(net, r.optimizer), 0, None
    while True:
        for x, y in loader:
            if done == 1:
                began = time.perf_counter()
            step(opt, torch.nn.functional.cross_entropy(net(x), y, label_smoothing=r.label_smoothing))
            done += 1
            if done == steps: return (steps-1)*r.batch_size/(time.perf_counter()-began)

def constant(x, y, r, steps):
    "Images per second on one batch that never changes."
    net = create_net(r.arch, 10, 3, 0).train()
    opt, x = create_optimizer(net, r.optimizer), scaled(torch.tensor(x[:r.batch_size]).permute(0, 3, 1, 2))
    y = torch.tensor(y[:r.batch_size])
    for k in range(steps):
        if k == 1:
            began = time.perf_counter()
        step(opt, losses(net(x), y, r).mean())
    return (steps-1)*r.batch_size/(time.perf_counter()-began)

def cpu(n, steps, batch=128):
    "The three sides on one thread."
    torch.set_num_threads(1)
    r = recipe(batch)
    with tempfile.TemporaryDirectory() as d:
        x, y = files(Path(d), n)
        rates = dict(ours=[], plain=[], constant=[])
        for _ in range(3):
            rates['ours'].append(ours(x, y, r, steps))
            rates['plain'].append(plain(d, r, steps))
            rates['constant'].append(constant(x, y, r, steps))
    best = {k: max(v) for k, v in rates.items()}
    work = dict(model='resnet18, channels 16-128, one block per stage, 32x32', images=n, batch_size=batch, steps=steps)
    machine = dict(threads=1, loader_workers=2, cores=os.cpu_count(), **VERSIONS)
    return dict(benchmark='train_cpu', **work, **machine, images_per_s={k: round(v, 1) for k, v in best.items()},
                ratio_to_plain=round(best['ours']/best['plain'], 3),
                share_of_constant=round(best['ours']/best['constant'], 3),
                all={k: [round(v, 1) for v in vs] for k, vs in rates.items()})

# ---- GPU

def matrix_rate(device):
    "bf16 matrix products per second that this chip reaches, in TFLOP/s."
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

def timms(net, opt, x, y, device, batch, steps):
    "Images per second of what timm's train.py does for a batch: autocast, AdamW, a mixed loss."
    mix, soft = timm.data.Mixup(.8, 1., label_smoothing=.1, num_classes=10), timm.loss.SoftTargetCrossEntropy()
    images, labels = torch.tensor(x).permute(0, 3, 1, 2).to(device), torch.tensor(y, device=device)
    for k in range(steps):
        if k == 1:
            sync(device)
            began = time.perf_counter()
        i = torch.arange(batch, device=device)+batch*(k % 4)
        xb, yb = mix(scaled(images[i]), labels[i])
        with torch.autocast(device, torch.bfloat16):
            loss = soft(net(xb), yb)
        step(opt, loss)
    sync(device)
    return (steps-1)*batch/(time.perf_counter()-began)

def gpu(tiny, batch=256, steps=60):
    "ViT-B/16, bf16: our loop, and timm's."
    from torch.utils.flop_counter import FlopCounterMode
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu' and not tiny:
        sys.exit('no GPU here; --tiny runs the code without one')
    arch, size = dict(name='vit_base_patch16_224'), 224
    if tiny:
        arch, size = dict(name='vit_tiny_patch16_224', kwargs=dict(img_size=32, patch_size=8, depth=2)), 32
        batch, steps = 16, 6
    r = recipe(batch, arch=arch, precision='bf16', augment=dict(flip=True, mixup=.8, cutmix=1.), input_size=size)
    x = np.random.default_rng(0).integers(0, 256, (4*batch, size, size, 3)).astype(np.uint8)
    y = np.arange(4*batch) % 10
    mine = ours(x, y, r, steps)
    net = create_net(Arch(**arch), 10, 3, 0).to(device).train()
    theirs = timms(net, create_optimizer(net, r.optimizer), x, y, device, batch, steps)
    count = FlopCounterMode(display=False)
    two = torch.tensor(x[:2]).permute(0, 3, 1, 2).to(device)
    with count:
        net(scaled(two)).sum().backward()
    per_image, peak = count.get_total_flops()/2, matrix_rate(device)
    chip = torch.cuda.get_device_name() if device == 'cuda' else 'cpu'
    work = dict(tiny=tiny, model=arch['name'], device=chip, batch_size=batch, steps=steps)
    return dict(benchmark='train_gpu', **work, **VERSIONS,
                images_per_s=dict(ours=round(mine, 1), timm=round(theirs, 1)), ratio_to_timm=round(mine/theirs, 3),
                GFLOP_an_image=round(per_image/1e9, 2), measured_matrix_TFLOP_s=round(peak, 1),
                share_of_matrix_rate=round(per_image*mine/1e12/peak, 3))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('part', nargs='?', default='cpu', choices=['cpu', 'gpu'])
    p.add_argument('--images', type=int, default=2000)
    p.add_argument('--steps', type=int, default=120)
    p.add_argument('--tiny', action='store_true')
    a = p.parse_args()
    print(json.dumps(cpu(a.images, a.steps) if a.part == 'cpu' else gpu(a.tiny)))
