"""CLIP training: this package's loop against open_clip_train's inner loop on the same model, batch and pairs in memory.
Prints one JSON line.

    python benchmarks/clip.py [cpu|gpu] [--pairs 2000] [--steps 60] [--batch 128] [--full-vocabulary]

cpu: two small towers at 32x32 on one thread, alternating, best of three. Sides:
  open_clip     train_one_epoch over a loader as its csv reader makes it, but for the files: images of the library
                Pillow, its training transform, its tokenizer for each caption; no worker processes
  open_clip_2   the same with two worker processes
  tensors       train_one_epoch over a loader of pixels and tokens that are ready: its loop without its input
  ours          train_clip
  constant      the same network, loss and optimizer on one batch that never changes: the most any input can reach

gpu: ViT-B/16 in bf16 on random weights and images that are ready in memory; needs a GPU. Pairs per second of each side
and the share of the chip's measured matrix rate. With --tiny it runs its code on a small network, on any machine, and
its numbers mean nothing.

Only tokens that occur are in the vocabulary of the small text tower, as with a tokenizer of the captions' own; with
--full-vocabulary it is CLIP's, whose table of 49,408 rows takes most of a small network's step.
"""
import argparse, json, os, sys, time
from importlib.metadata import version
import numpy as np, open_clip, torch
from open_clip.model import CLIP
from open_clip_train.data import DataInfo
from open_clip_train.params import parse_args
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from train import matrix_rate, sync

VERSIONS = {k: version(k) for k in ('torch', 'torchvision', 'open_clip_torch', 'timm')} | {
    'python': sys.version.split()[0]}
SIZE, CONTEXT = 32, 16
MEAN = STD = (.5, .5, .5)
WORDS = 'red green blue large small old new left right round flat dark light first last wooden'.split()

class Words:
    "open_clip's tokenizer; unless `full`, its numbers are those of the tokens that occur, in the same order."
    def __init__(self, captions, context, full):
        self.tokenizer = open_clip.SimpleTokenizer(context_length=context)
        seen = torch.unique(self.tokenizer(captions))
        self.number = torch.zeros(self.tokenizer.vocab_size, dtype=torch.long)
        self.number[seen] = torch.arange(len(seen))
        if full:
            self.number = torch.arange(self.tokenizer.vocab_size)
        self.n = int(self.number.max())+1

    def __call__(self, texts):
        return self.number[self.tokenizer(texts)]

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

def pairs(n, size=SIZE):
    "n smooth random images, uint8, and a caption of each."
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(n)]
    images = np.stack([np.asarray(a.resize((size, size), Image.Resampling.BICUBIC)) for a in small])
    return images, [f"a {' '.join(rng.choice(WORDS, 3))} thing, number {i}" for i in range(n)]

def small_net(vocabulary):
    "Two towers of two layers and width 64, with the same weights for every side."
    torch.manual_seed(0)
    return CLIP(64, dict(image_size=SIZE, patch_size=8, layers=2, width=64, head_width=32),
                dict(context_length=CONTEXT, vocab_size=vocabulary, layers=2, width=64, heads=2), output_dict=True)

def adamw(net, lr=1e-3, wd=.2):
    "The optimizer as open_clip_train makes it: no decay of gains, biases and the scale."
    plain = [p for n, p in net.named_parameters() if p.ndim < 2 or 'logit_scale' in n or 'ln' in n or 'bn' in n]
    known = {id(p) for p in plain}
    rest = [p for p in net.parameters() if id(p) not in known]
    return torch.optim.AdamW([dict(params=plain, weight_decay=0.), dict(params=rest, weight_decay=wd)], lr=lr,
                             betas=(.9, .98), eps=1e-6)

class Read(Dataset):
    "What open_clip_train's CsvDataset does, from memory."
    def __init__(self, images, captions, tokenizer):
        self.images, self.captions, self.tokenizer = [Image.fromarray(a) for a in images], captions, tokenizer
        self.transform = open_clip.image_transform(images.shape[1], is_train=True, mean=MEAN, std=STD)

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.tokenizer([str(self.captions[i])])[0]

class Timed:
    "A loader that stops after so many steps in all, and notes when the first and the last one have ended."
    def __init__(self, loader, batch, steps, device):
        self.loader, self.left, self.device, self.ended = loader, steps, device, []
        self.num_batches, self.num_samples = len(loader), len(loader)*batch

    def __iter__(self):
        for batch in self.loader:
            self.left -= 1
            yield batch
            if not self.ended or not self.left:
                sync(self.device)
                self.ended.append(time.perf_counter())
            if not self.left: return

def open_clips(net, opt, dataset, batch, steps, workers=0, precision='fp32', device='cpu'):
    "Pairs per second of open_clip_train's loop over an epoch, as many epochs as it takes."
    args = parse_args(['--batch-size', str(batch), '--precision', precision, '--device', device, '--model', 'ViT'])
    vars(args).update(distill=False, distributed=False, world_size=1, rank=0, local_rank=0, wandb=False)
    pin = device == 'cuda'
    loader = DataLoader(dataset, batch, shuffle=True, num_workers=workers, pin_memory=pin, drop_last=True)
    timed, loss = Timed(loader, batch, steps, device), open_clip.ClipLoss()
    data, schedule = dict(train=DataInfo(timed)), cosine_lr(opt, 1e-3, 10, steps+1)
    epoch = 0
    while timed.left:
        train_one_epoch(net, data, loss, epoch, opt, None, schedule, None, args)
        epoch += 1
    return (steps-1)*batch/(timed.ended[-1]-timed.ended[0])

def ours(net, opt, images, captions, tokenizer, batch, steps, precision='fp32', device='cpu'):
    """Pairs per second of synthscale.clip_train.train_clip, with its own optimizer of the same kind, from the first
    forward pass to the last: what comes before the first step is left out, as on the other sides."""
    from synthscale.clip_curves import ClipModelSpec, ClipRecipe
    from synthscale.clip_models import ClipModel
    from synthscale.clip_train import train_clip
    recipe = ClipRecipe(reference='a benchmark', model=ClipModelSpec(name='ViT-B-16'), samples_seen_at_100=1,
                        samples_seen_power=1., batch_size=batch, precision='bf16' if 'bf16' in precision else 'no',
                        optimizer=dict(name='adamw', lr=1e-3, weight_decay=.2,
                                       kwargs=dict(betas=[.9, .98], eps=1e-6)))
    m = ClipModel(net, tokenizer, {}, images.shape[1], 3, MEAN, STD)
    began = []
    def note(*_):
        sync(device)
        began.append(time.perf_counter())
    hook = net.register_forward_pre_hook(note)
    train_clip(m, images, captions, recipe, steps*batch, 0)
    hook.remove()
    return (steps-1)*batch/(began[-1]-began[0])

def constant(net, opt, dataset, batch, steps, device='cpu'):
    "Pairs per second on one batch that never changes; bf16 where it is on a GPU."
    x, y = (torch.stack(t).to(device) for t in zip(*(dataset[i] for i in range(batch))))
    loss = open_clip.ClipLoss()
    net.train()
    for k in range(steps):
        if k == 1:
            sync(device)
            began = time.perf_counter()
        opt.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == 'cuda'):
            total = loss(**net(x, y))
        total.backward()
        opt.step()
        with torch.no_grad():
            net.logit_scale.clamp_(0, np.log(100))
    sync(device)
    return (steps-1)*batch/(time.perf_counter()-began)

def ready(read):
    "Pixels and tokens of all pairs, once transformed."
    return torch.utils.data.TensorDataset(*(torch.stack(t) for t in zip(*read)))

def multiplications(net, x, y):
    "Multiplications and additions of a pair, forward and backward, each counted as one."
    from torch.utils.flop_counter import FlopCounterMode
    count = FlopCounterMode(display=False)
    with count:
        open_clip.ClipLoss()(**net(x, y)).backward()
    net.zero_grad()
    return count.get_total_flops()/len(x)

def ratios(best):
    "Ours against the others; None where it was not timed."
    mine = best['ours']
    return {f'ratio_to_{k}': round(mine/v, 3) if mine else None for k, v in best.items() if k not in ('ours',)}

def cpu(n, steps, batch, full):
    "All sides on one thread."
    torch.set_num_threads(1)
    images, captions = pairs(n)
    words = Words(captions, CONTEXT, full)
    read = Read(images, captions, words)
    tensors = ready(read)
    rates = {}
    def note(side, function, *args):
        net = small_net(words.n)
        rates.setdefault(side, []).append(function(net, adamw(net), *args))
    for _ in range(3):
        note('ours', ours, images, captions, words, batch, steps)
        note('open_clip', open_clips, read, batch, steps)
        note('open_clip_2', open_clips, read, batch, steps, 2)
        note('tensors', open_clips, tensors, batch, steps)
        note('constant', constant, tensors, batch, steps)
    best = {k: max((r for r in v if r), default=None) for k, v in rates.items()}
    flops = multiplications(small_net(words.n), *tensors[:8])
    work = dict(model='two towers of 2 layers, width 64; 32x32 in patches of 8; 16 tokens', vocabulary=words.n,
                pairs=n, batch_size=batch, steps=steps, MFLOP_a_pair=round(flops/1e6, 2))
    return dict(benchmark='clip_cpu', **work, threads=1, cores=os.cpu_count(), **VERSIONS,
                pairs_per_s={k: v and round(v, 1) for k, v in best.items()}, **ratios(best),
                all={k: [r and round(r, 1) for r in v] for k, v in rates.items()})

# ---- GPU

def gpu(tiny, batch=256, steps=40):
    "ViT-B/16 in bf16: both loops over pixels and tokens that are ready, and a constant batch."
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu' and not tiny:
        sys.exit('no GPU here; --tiny runs the code without one')
    size, context, name = (SIZE, CONTEXT, 'small') if tiny else (224, 77, 'ViT-B-16')
    batch, steps = (16, 4) if tiny else (batch, steps)
    images, captions = pairs(4*batch, size)
    words = Words(captions, context, full=not tiny)
    dataset, rates = ready(Read(images, captions, words)), {}
    for side in ('ours', 'tensors', 'constant'):
        net = small_net(words.n) if tiny else open_clip.create_model(name, output_dict=True)
        net = net.to(device)
        opt = adamw(net)
        if side == 'ours':
            rates[side] = ours(net, opt, images, captions, words, batch, steps, 'amp_bf16', device)
        elif side == 'tensors':
            rates[side] = open_clips(net, opt, dataset, batch, steps, 0 if tiny else 8, 'amp_bf16', device)
        else:
            rates[side] = constant(net, opt, dataset, batch, steps, device)
    per_pair = multiplications(net, *(t.to(device) for t in dataset[:2]))
    peak = matrix_rate(device)
    chip = torch.cuda.get_device_name() if device == 'cuda' else 'cpu'
    return dict(benchmark='clip_gpu', tiny=tiny, model=name, device=chip, batch_size=batch, steps=steps, **VERSIONS,
                pairs_per_s={k: v and round(v, 1) for k, v in rates.items()}, **ratios(rates),
                GFLOP_a_pair=round(per_pair/1e9, 3), measured_matrix_TFLOP_s=round(peak, 1),
                share_of_matrix_rate={k: v and round(per_pair*v/1e12/peak, 3) for k, v in rates.items()})

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('part', nargs='?', default='cpu', choices=['cpu', 'gpu'])
    p.add_argument('--pairs', type=int, default=2000)
    p.add_argument('--steps', type=int, default=60)
    p.add_argument('--batch', type=int, default=128)
    p.add_argument('--full-vocabulary', action='store_true')
    p.add_argument('--tiny', action='store_true')
    a = p.parse_args()
    print(json.dumps(gpu(a.tiny) if a.part == 'gpu' else cpu(a.pairs, a.steps, a.batch, a.full_vocabulary)))
