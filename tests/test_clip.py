"CLIP models: our loop against open_clip's trainer, several processes, kills, pools and arms, bad input."
import json, os, subprocess, sys
from pathlib import Path
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from clip_parity import CONFIG, WHOLE, run_open_clip, small_csv, small_pairs, tiny_model
from conftest import ROOT, environment
from synthscale.clip_curves import ClipModelSpec, ClipRecipe
from synthscale.clip_models import build_clip
from synthscale.clip_train import pair_stream, train_clip, train_steps
from synthscale.recipes import Optimizer, Schedule
from synthscale.study import StudyError
from synthscale.train import Mix

SPEC = ClipModelSpec(config=CONFIG['model_cfg'], mean=[.5, .5, .5], std=[.5, .5, .5])

def recipe(**more):
    "A recipe of the tiny model."
    given_ = dict(reference='a test', model=SPEC, samples_seen_at_100=320, samples_seen_power=1., batch_size=16,
                  optimizer=Optimizer(name='adamw', lr=.001, weight_decay=.2,
                                      kwargs=dict(betas=[.9, .98], eps=1e-6)))
    return ClipRecipe(**(given_ | more))

def largest_gap(a, b):
    """The largest difference between two sets of weights. The bias of an attention's keys is left out: softmax is blind
    to it, so that its gradient is rounding alone, which AdamW scales up to steps of the learning rate."""
    gaps = {k: (a[k]-b[k]).abs() for k in a}
    for k, v in gaps.items():
        if k.endswith('attn.in_proj_bias'):
            v.view(3, -1)[1].zero_()
    return max(float(v.max()) for v in gaps.values())

# ---- against open_clip_train

@pytest.mark.slow
@pytest.mark.parametrize('loss', ['clip', 'siglip'])
def test_our_loop_ends_with_the_weights_of_open_clips_trainer_on_the_same_batches(tmp_path, loss):
    "Three epochs of four steps by `open_clip_train.main.main([...])`, whose batches are then given to our loop."
    data = small_csv(tmp_path/'data', small_pairs(64))
    args = ['--model', tiny_model(tmp_path/'model'), '--train-data', data, '--dataset-type', 'csv', '--batch-size', '16',
            '--epochs', '3', '--warmup', '3', '--lr', '1e-3', '--wd', '.2', '--beta1', '.9', '--beta2', '.98', '--eps',
            '1e-6', '--workers', '0', '--seed', '1', '--precision', 'fp32', *WHOLE, *(['--siglip'] if loss == 'siglip' else [])]
    theirs, = run_open_clip(args, tmp_path/'run')
    shown = [b for epoch in theirs.epochs for b in epoch]
    assert len(shown) == 12
    ours = build_clip(SPEC, 16, 3, 0, loss)
    ours.net.load_state_dict(theirs.start)
    train_steps(ours, recipe(loss=loss, schedule=Schedule(warmup=3/12)), 12, 0,
                lambda start: lambda step, generator: shown[step])
    moved, most = largest_gap(theirs.start, theirs.end), largest_gap(ours.net.state_dict(), theirs.end)
    print(f'{loss}: weights moved by {moved:.1e} and differ by {most:.1e}')
    assert moved > 1e-3 and most < 1e-5

# ---- several processes

TORCHRUN = """
import sys, torch
sys.path[:0] = [sys.argv[3]]
torch.set_num_threads(1)
from safetensors.torch import save_file
from test_clip import recipe, striped
from synthscale.clip_models import build_clip
from synthscale.clip_train import train_clip
from synthscale.train import accelerator
own = recipe(loss=sys.argv[2], micro_batch=int(sys.argv[4]) or None)
m = build_clip(own.model, 16, 3, 0, own.loss)
acc = accelerator(own, cpu=True)
train_clip(m, *striped(48), own, 50*16, 0, acc=acc)
if acc.is_main_process:
    save_file({k: v.contiguous().clone() for k, v in m.net.state_dict().items()}, sys.argv[1])
"""

def striped(n, seed=0):
    "Images of stripes, and captions that say which; some captions are there twice."
    rng, k = np.random.default_rng(seed), np.arange(n) % 12
    rows = np.sin((k[:, None]+1)*np.linspace(0, 3, 16))*90+128+rng.normal(0, 10, (n, 16))
    images = np.broadcast_to(rows[:, :, None, None], (n, 16, 16, 3)).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(images), [f'stripes of kind {i}, {j % 40}' for j, i in enumerate(k)]

@pytest.mark.slow
@pytest.mark.parametrize('loss, micro', [('clip', 0), ('clip', 3), ('siglip', 0)])
def test_two_processes_train_what_one_trains(tmp_path, loss, micro):
    "50 steps under torchrun with gathered features, also where each process passes its part of a batch in parts."
    from safetensors.torch import load_file
    (tmp_path/'run.py').write_text(TORCHRUN)
    found = []
    for n in (1, 2):
        out = tmp_path/f'{n}.safetensors'
        cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), 'run.py',
               str(out), loss, str(ROOT/'tests'), str(micro if n == 2 else 0)]
        env = environment() | {'PYTHONPATH': f"{ROOT}", 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
        r = subprocess.run(cmd, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert out.exists(), r.stderr[-3000:]
        found.append(load_file(out))
    gap = largest_gap(*found)
    print(f'{loss}, {micro or "no"} parts: one process and two differ by {gap:.1e} after 50 steps')
    assert gap < 1e-4

# ---- which pairs are shown together

@settings(max_examples=60, deadline=None)
@given(n=st.integers(4, 60), batch=st.integers(2, 30), steps=st.integers(1, 30), words=st.integers(1, 60),
       seed=st.integers(0, 9), avoid=st.booleans())
def test_every_pair_is_shown_once_per_pass(n, batch, steps, words, seed, avoid):
    "And the repeats that are counted are those that are there; avoiding them never gives more."
    captions = np.random.default_rng(seed).integers(0, words, n)
    if batch > n:
        with pytest.raises(StudyError, match='a batch takes'):
            pair_stream(captions, steps, batch, torch.Generator().manual_seed(seed))
        return
    stream, repeats = pair_stream(captions, steps, batch, torch.Generator().manual_seed(seed), avoid=avoid)
    shown = np.bincount(stream.flatten(), minlength=n)
    assert stream.shape == (steps, batch) and shown.max()-shown.min() <= 1
    assert repeats == sum(batch-len(set(captions[row])) for row in stream.tolist())
    naive = pair_stream(captions, steps, batch, torch.Generator().manual_seed(seed), avoid=False)[1]
    assert not avoid or repeats <= naive

@settings(max_examples=40, deadline=None)
@given(n=st.integers(8, 40), batch=st.integers(4, 8), steps=st.integers(1, 20), share=st.floats(.2, .8),
       seed=st.integers(0, 9))
def test_each_kind_has_its_share_of_every_batch(n, batch, steps, share, seed):
    "Real and synthetic images of the same captions: passes of their own, and no caption twice where that is possible."
    mix = Mix((n, n), (share, 1-share))
    stream, repeats = pair_stream(np.tile(np.arange(n), 2), steps, batch, torch.Generator().manual_seed(seed), mix)
    assert set((stream < n).sum(1).tolist()) == {mix.of_batch(batch)[0]} and repeats == 0
    for kind in (stream[stream < n], stream[stream >= n]-n):
        shown = np.bincount(kind, minlength=n)
        assert shown.max()-shown.min() <= 1
