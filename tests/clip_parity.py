"""open_clip_train's own trainer for a few steps on small images, on a CPU: its weights before and after, and the
batches that it showed, so that another loop can be given the same ones.

`run_open_clip` runs `open_clip_train.main.main([...])` in a process of its own, or in several under torchrun, since it
sets up global logging and may exit. This file is also the program of that process:

    python tests/clip_parity.py FOLDER ARGUMENT ...      # arguments of open_clip_train.main
"""
import json, os, subprocess, sys
from dataclasses import dataclass
from pathlib import Path
import numpy as np

CONFIG = dict(      # a two-layer CLIP with open_clip's tokenizer, for images of 16 x 16 pixels
    model_cfg=dict(embed_dim=32,
                   vision_cfg=dict(image_size=16, layers=2, width=32, head_width=16, patch_size=8),
                   text_cfg=dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=2)),
    preprocess_cfg=dict(size=16, mean=[.5, .5, .5], std=[.5, .5, .5], interpolation='bicubic',
                        resize_mode='shortest'))
WHOLE = ['--aug-cfg', 'scale=(1.0,1.0)']      # its random crop is then the whole of a square image

@dataclass
class Run:
    "What one process of a run saw and made."
    start: dict      # weights before the first step: name -> tensor
    end: dict        # after the last epoch
    epochs: list     # of each epoch the batches, (images as the network gets them, tokens)

def tiny_model(folder, config=CONFIG):
    "The name by which open_clip finds a configuration of one's own."
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder)/'open_clip_config.json').write_text(json.dumps(config))
    return f'local-dir:{folder}'

def small_pairs(n, size=16, seed=0):
    "n pairs of random images as `export_pairs` takes them; each has a caption of its own."
    from synthscale.shards import encode_image
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 255, (n, size, size, 3), np.uint8)
    return [(f'{i:06d}', (encode_image(a), 'png'), f'pair {i}') for i, a in enumerate(images)]

def small_csv(folder, pairs):
    "Pairs as image files and the csv that open_clip_train reads by default."
    from synthscale.clip_export import export_pairs
    export_pairs(pairs, folder, 1, dataset_type='csv')
    return str(Path(folder)/'pairs.csv')

def pair_numbers(tokens, captions, tokenizer):
    "Which captions some rows of tokens are."
    known = {tuple(row): i for i, row in enumerate(tokenizer(captions).tolist())}
    return [known[tuple(row)] for row in tokens.tolist()]

def run_open_clip(args, folder, world=1, timeout=600):
    "`open_clip_train.main.main(args)` on a CPU: what each process saw and made, one `Run` a process."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    start = [sys.executable]
    if world > 1:
        start += ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(world), '--']
    more = ['--device', 'cpu', '--logs', str(folder/'logs'), '--name', 'run']
    r = subprocess.run([*start, __file__, str(folder), *args, *more], capture_output=True, text=True, timeout=timeout,
                       env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
    assert r.returncode == 0, f'open_clip_train failed:\n{r.stdout[-1000:]}{r.stderr[-4000:]}'
    return [_read(folder/f'{rank}.safetensors') for rank in range(world)]

def _read(path):
    "The record of one process."
    from safetensors.torch import load_file
    found = load_file(path)
    run = Run({}, {}, [[] for _ in range(1+max((int(k.split('/')[1]) for k in found if k.startswith('epoch/')),
                                               default=-1))])
    for k, v in found.items():
        part, _, name = k.partition('/')
        if part in ('start', 'end'):
            getattr(run, part)[name] = v
    for e, batches in enumerate(run.epochs):
        n = sum(k.startswith(f'epoch/{e}/') for k in found)//2
        batches += [(found[f'epoch/{e}/{i}/images'], found[f'epoch/{e}/{i}/texts']) for i in range(n)]
    return run

class _Recorded:
    "A loader that keeps what it gives."
    def __init__(self, loader, kept, epoch):
        self.loader, self.kept, self.epoch = loader, kept, epoch

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __iter__(self):
        for i, (images, texts) in enumerate(self.loader):
            self.kept[f'epoch/{self.epoch}/{i}/images'] = images.clone()
            self.kept[f'epoch/{self.epoch}/{i}/texts'] = texts.clone()
            yield images, texts

def _recording(kept):
    "open_clip_train's loop over an epoch, with a record of the weights and the batches around it."
    from open_clip_train.train import train_one_epoch, unwrap_model
    def note(model, when):
        kept.update({f'{when}/{k}': v.clone().contiguous() for k, v in unwrap_model(model).state_dict().items()})
    def recording(model, data, loss, epoch, *args, **kw):
        if not any(k.startswith('start/') for k in kept):
            note(model, 'start')
        real = data['train'].dataloader
        data['train'].dataloader = _Recorded(real, kept, epoch)
        train_one_epoch(model, data, loss, epoch, *args, **kw)
        data['train'].dataloader = real
        note(model, 'end')
    return recording

def _main(folder, args):
    "Run the trainer with the record, and without DDP's list of devices, which it takes for GPUs."
    import torch
    from safetensors.torch import save_file
    torch.set_num_threads(1)
    import open_clip_train.main as m
    kept, ddp = {}, torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = lambda model, device_ids=None, **kw: ddp(model, **kw)
    m.train_one_epoch = _recording(kept)
    if m.main(args) == -1:
        sys.exit('open_clip_train returned -1: a run of this name is there')
    save_file(kept, Path(folder)/f"{os.environ.get('RANK', 0)}.safetensors")

if __name__ == '__main__':
    _main(sys.argv[1], sys.argv[2:])
