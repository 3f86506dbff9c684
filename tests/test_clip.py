"CLIP models: our loop against open_clip's trainer, several processes, kills, pools and arms, bad input."
import json, shutil, signal, subprocess, sys, time
import numpy as np
import pandas as pd
import pytest, torch
from hypothesis import given, settings, strategies as st
from clip_parity import CONFIG, WHOLE, run_open_clip, small_csv, small_pairs, tiny_model
from conftest import ROOT, copy_repo, dump, edit, environment, forget, load, ran, sh
from synthscale.classify import find_point
from synthscale.clip import point_config, run_pairs
from synthscale.clip_curves import ClipModelSpec, ClipRecipe
from synthscale.clip_models import build_clip, load_clip, save_clip
from synthscale.clip_train import pair_stream, train_steps
from synthscale.curves import curve_points
from synthscale.study_curves import curve_of
from synthscale.params import problems
from synthscale.recipes import Optimizer, Schedule
from synthscale.smoke import make_inputs, smoke_pairs_study, smoke_params, with_pairs
from synthscale.study import Study, StudyError
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
    args = ['--model', tiny_model(tmp_path/'model'), '--train-data', data, '--dataset-type', 'csv', '--workers', '0',
            '--batch-size', '16', '--epochs', '3', '--warmup', '3', '--lr', '1e-3', '--wd', '.2', '--beta1', '.9',
            '--beta2', '.98', '--eps', '1e-6', '--seed', '1', '--precision', 'fp32', *WHOLE,
            *(['--siglip'] if loss == 'siglip' else [])]
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
@pytest.mark.parametrize('loss, micro', [('clip', 3)]+[
    pytest.param(*how, marks=pytest.mark.campaign) for how in (('clip', 0), ('siglip', 0))])     # as simple, or simpler
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
@given(n=st.integers(24, 60), batch=st.integers(4, 8), steps=st.integers(1, 20), share=st.floats(.2, .8),
       seed=st.integers(0, 9))
def test_each_kind_has_its_share_of_every_batch(n, batch, steps, share, seed):
    "Real and synthetic images of the same captions: passes of their own, and no caption twice where that is possible."
    mix = Mix((n, n), (share, 1-share))
    stream, repeats = pair_stream(np.tile(np.arange(n), 2), steps, batch, torch.Generator().manual_seed(seed), mix)
    assert set((stream < n).sum(1).tolist()) == {mix.of_batch(batch)[0]} and repeats == 0
    for kind in (stream[stream < n], stream[stream >= n]-n):
        shown = np.bincount(kind, minlength=n)
        assert shown.max()-shown.min() <= 1

# ---- a study with pairs

@pytest.fixture(scope='module')
def made():
    "The smoke study with pairs: sets, models, pools and what was drawn for their captions."
    return Study(smoke_pairs_study())

@pytest.fixture
def study(made, tmp_path):
    "A copy of it to break."
    shutil.copytree(made.dir, tmp_path/'study', symlinks=True)
    return Study(tmp_path/'study')

def changed(study, change):
    "The study with other params.yaml."
    p = load(study.dir/'params.yaml')
    change(p)
    dump(p, study.dir/'params.yaml')
    return Study(study.dir)

TRAIN = """
import sys
from synthscale.clip import run_pairs
from synthscale.study import Study
run_pairs(Study(sys.argv[1]), 'pairs_both', workers=1)
"""

@pytest.mark.slow
def test_a_curve_that_is_killed_again_and_again_ends_with_the_same_numbers(study):
    "States are written after every step here, so that each kill falls into a resumed run."
    whole = run_pairs(study, 'pairs_both', workers=1)
    kept = {p.name: p.read_bytes() for p in study.path('build', 'points').rglob('*.json')}
    shutil.rmtree(study.path('build', 'points'))
    (study.path('runs', 'classify', 'pairs_both', 'points.jsonl')).unlink()
    env = environment() | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    for seconds in (6, 8, 10):
        p = subprocess.Popen([sys.executable, '-c', TRAIN, str(study.dir)], env=env, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        p.send_signal(signal.SIGKILL)
        p.wait()
    again = run_pairs(study, 'pairs_both', workers=1)
    drop = ['point']
    pd.testing.assert_frame_equal(again.drop(columns=drop), whole.drop(columns=drop))
    for name, old in kept.items():
        new, before = (json.loads(b) for b in (next(study.path('build', 'points').rglob(name)).read_bytes(), old))
        assert new['tests'] == before['tests'] and new['retrieval'] == before['retrieval']

def test_the_arms_of_a_pool_have_the_same_captions_at_every_size_and_seed(made):
    from synthscale.clip import pair_rows
    both = [p for c in ('pairs_real', 'pairs_drawn', 'pairs_both') for p in curve_points(curve_of(made, c))]
    found = {}
    for p in both:
        captions, arms = pair_rows(made, p)
        assert len(arms) == bool(p.n_real)+bool(p.n_synthetic) and all(len(at) == len(captions) for *_, at in arms)
        found.setdefault((max(p.n_real, p.n_synthetic), p.seed), set()).add(tuple(captions))
    assert all(len(v) == 1 for v in found.values()) and len(found) == 2

def test_both_controls_of_a_mixture_show_what_they_say(made):
    "As many images as an arm alone, or each real image as often."
    curves = {c: curve_points(curve_of(made, c))[-1] for c in ('pairs_real', 'pairs_both')}
    from dataclasses import replace
    from synthscale.clip import samples_shown
    alone = samples_shown(made, curves['pairs_real'])
    assert samples_shown(made, curves['pairs_both']) == alone
    exposed = replace(curves['pairs_both'], equal_exposures=True)
    assert samples_shown(made, exposed) == 2*alone       # half of each batch is real

WRONG = [      # what is changed in params.yaml, and what is said of it
    (lambda p: p['clip']['curves']['pairs_real'].update(captions='word'), "clip.curves.pairs_real.captions is 'word'"),
    (lambda p: p['clip']['curves']['pairs_real'].update(set='digits'), "clip.curves.pairs_real.set is 'digits'"),
    (lambda p: p['clip']['curves']['pairs_real'].update(n_pairs=[40, 90]), 'at most 80 pairs'),
    (lambda p: p['clip']['curves']['pairs_real'].update(recipe='smal'), "clip.curves.pairs_real.recipe is 'smal'"),
    (lambda p: p['clip'].update(retrieval=['held']), "clip.retrieval is 'held'"),
    (lambda p: p['clip'].update(retrieval=[], zero_shot=None), 'asked nothing'),
    (lambda p: p['clip']['zero_shot'].update(names=dict(sixx='6')), "clip.zero_shot.names is 'sixx'"),
    (lambda p: p['clip']['attributes']['weight'].update(split='tes'), "clip.attributes.weight.split is 'tes'"),
    (lambda p: p['clip']['pools']['words'].update(split='test', set='digits'), 'clip.pools.words.split'),
    (lambda p: p['clip']['recipes']['small']['model'].update(name='ViT/B-16'), 'clip.recipes.small.model.name'),
    (lambda p: p['clip']['recipes']['small'].update(max_cut=2.), 'clip.recipes.small.max_cut'),
    (lambda p: p['clip']['mixtures']['pairs_both'].update(real_share=1.), 'clip.mixtures.pairs_both.real_share'),
    (lambda p: p['clip']['curves'].update(digits=p['clip']['curves'].pop('pairs_real')), 'needs its own name'),
]

@pytest.mark.parametrize('change, says', WRONG, ids=[says[:40] for _, says in WRONG])
def test_what_is_wrong_in_the_section_clip_is_named_before_anything_runs(change, says):
    p = with_pairs(smoke_params())
    assert problems(Study(ROOT, p)) == []
    change(p)
    assert says in '\n'.join(problems(Study(ROOT, p)))

BROKEN = [     # curve, what is changed, what is said
    ('pairs_real', lambda p: p['clip']['recipes']['small'].update(batch_size=64), '40 pairs, and a batch takes 64'),
    ('pairs_both', lambda p: p['clip']['recipes']['small'].update(batch_size=96), 'expected clip.recipes.small.batch'),
    ('pairs_real', lambda p: p['clip']['recipes']['small']['model'].update(config={}, name='ViT-B-17'), 'no such arch'),
    ('pairs_real', lambda p: p['clip']['recipes']['small']['model']['config']['text_cfg'].update(context_length=5),
     'are longer than the 5 tokens'),
    ('pairs_real', lambda p: p['clip']['recipes']['small']['model']['config'].update(text_cfg=dict(widht=3)),
     'open_clip cannot make'),
    ('pairs_real', lambda p: p['classify']['eval'].update(in_domain_splits=['held_out', 'train']),
     'are also test images'),
    ('pairs_real', lambda p: p['clip'].update(retrieval=['val']), 'have no caption'),
]

@pytest.mark.parametrize('curve, change, says', BROKEN, ids=[says for *_, says in BROKEN])
def test_nothing_is_trained_on_what_does_not_fit(study, curve, change, says):
    study = changed(study, change)
    with pytest.raises(StudyError, match=says):
        run_pairs(study, curve, workers=1)
    assert not study.path('runs', 'classify', curve, 'curve.csv').exists()

def test_an_arm_of_another_length_is_refused(study):
    "Images that are gone from a source, and a pool that grew after its images were drawn."
    m = pd.read_parquet(study.set_dir('words_g1')/'manifest.parquet')
    whole = (study.set_dir('words_g1')/'manifest.parquet').read_bytes()
    m.iloc[:-10].to_parquet(study.set_dir('words_g1')/'manifest.parquet', index=False)
    with pytest.raises(StudyError, match='words_g1'):
        run_pairs(study, 'pairs_drawn', workers=1)
    (study.set_dir('words_g1')/'manifest.parquet').write_bytes(whole)
    from synthscale.pools import write_pool
    study = changed(study, lambda p: p['clip']['pools']['words'].update(n=100))
    write_pool(study, 'words')
    with pytest.raises(StudyError, match='number of images is 80: expected 100'):
        run_pairs(study, 'pairs_drawn', workers=1)

def test_what_decides_a_point_decides_its_key(study):
    "Recipe, what is asked and of which images: each change makes another point; a label in a figure does not."
    point = curve_points(curve_of(study, 'pairs_real'))[0]
    first = point_config(study, point)
    assert point_config(changed(study, lambda p: p['report'].update(labels=dict(pairs_real='x'))), point) == first
    for change in (lambda p: p['clip']['recipes']['small'].update(repeats='count'),
                   lambda p: p['clip']['zero_shot'].update(templates=['{}']),
                   lambda p: p['clip'].update(retrieval=[]),
                   lambda p: p['clip']['attributes']['weight'].update(templates=['{}']),
                   lambda p: p['study'].update(seed=1)):
        other = changed(study, change)
        assert point_config(other, point) != first
        assert find_point(other, point_config(other, point)) is None

def test_the_weights_of_another_model_are_refused(tmp_path):
    "The kinds: other widths, a bias that is not there, a file that is none, a description that is none."
    m = build_clip(SPEC, 16, 3, 0)
    save_clip(tmp_path/'a', m, SPEC)
    assert load_clip(tmp_path/'a').size == 16
    narrow = ClipModelSpec(config=CONFIG['model_cfg'] | dict(embed_dim=24))
    for other in (build_clip(narrow, 16, 3, 0), build_clip(SPEC, 16, 3, 0, 'siglip')):
        save_clip(tmp_path/'b', other, SPEC)
        shutil.copy(tmp_path/'a'/'synthscale.json', tmp_path/'b')
        with pytest.raises(StudyError, match='the weights of another model'):
            load_clip(tmp_path/'b')
    (tmp_path/'a'/'open_clip_model.safetensors').write_bytes(b'x')
    with pytest.raises(StudyError, match='the weights of another model'):
        load_clip(tmp_path/'a')
    (tmp_path/'a'/'synthscale.json').write_text('{}')
    with pytest.raises(StudyError, match='not the description'):
        load_clip(tmp_path/'a')

@pytest.mark.slow
def test_pairs_in_the_pipeline(repo):
    "Pool, source and arms are stages; their rows are in the tables of the study; what was run is found again."
    section = with_pairs(smoke_params())
    def add(p):
        p['clip'] = section['clip'] | dict(retrieval=[], attributes={})
        source = {k: v for k, v in section['generate']['sources']['words_g1'].items() if k != 'curve'}
        p['generate']['sources']['words_g1'] = source
        p['laws'] |= dict(x=dict(pairs_both='n_real'), fit_range=dict(pairs_both=[40, 80]))
        p['laws']['compare'].append(['pairs_real', 'pairs_drawn'])
        p['report']['supervision'] = dict(labels=['digits'], captions=['pairs_real', 'pairs_drawn', 'pairs_both'])
        p['models']['judge'] = dict(type='local', input='judge', task='zero-shot-image-classification')
        p['quality']['clip'] = dict(words_g1=dict(model='judge'), names_g2=dict(model='judge'))
    edit(repo, add)
    save_clip(repo/'judge', build_clip(SPEC, 16, 3, 0), SPEC)
    made = ran(sh('dvc repro', repo))
    assert made == {'prepare', 'pools@words', 'generate@words_g1', 'models@judge', 'clip_scores@names_g2',
                    'clip_scores@words_g1', 'quality_sources@words_g1', 'classify_sources@words_g1',
                    'clip@pairs_real', 'clip@pairs_drawn', 'clip_mixtures@pairs_both', 'results', 'laws', 'report'}
    assert ran(sh('dvc repro', repo)) == set()
    for table, column in (('curves', 'curve'), ('laws', 'curve'), ('comparisons', 'a'), ('pairs', 'curve')):
        assert 'pairs_real' in set(pd.read_csv(repo/'results'/f'{table}.csv')[column]), table
    scores = pd.read_csv(repo/'results'/'quality.csv').query("metric == 'clip_score' and `class` == 'all'")
    assert dict(zip(scores['set'], scores.network)) == dict(names_g2='judge', words_g1='judge')
    assert {f'supervision_{t}.png' for t in ('test', 'ood')} <= {f.name for f in (repo/'figures').iterdir()}
    shutil.rmtree(repo/'build'/'points')
    forget(repo, {'clip', 'clip_mixtures'})
    out = sh('dvc repro', repo)
    assert {'clip@pairs_real', 'clip_mixtures@pairs_both'} <= ran(out) and 'laws' not in ran(out)
    edit(repo, lambda p: p['clip']['curves'].pop('pairs_drawn') and p['laws']['compare'].pop()
         and p['report']['supervision']['captions'].remove('pairs_drawn'))
    sh('dvc repro', repo)
    assert not (repo/'runs'/'classify'/'pairs_drawn').exists()
    assert 'pairs_drawn' not in set(pd.read_csv(repo/'results'/'curves.csv').curve)

def without_classes():
    "A study that has image-caption pairs and nothing else: no classes, no classifiers, no generator."
    p = with_pairs(smoke_params())
    splits = dict(train=120, dev=40, held_out=40)
    p['data']['sets'] = dict(rendered=p['data']['sets']['rendered'] | dict(splits=splits))
    p['clip'] |= dict(zero_shot=None, attributes={}, mixtures={}, retrieval=['dev', 'held_out'],
                      pools=dict(words=dict(set='rendered', n=120)), seeds=2,
                      curves=dict(pairs_real=dict(captions='words', set='rendered', n_pairs=[40, 80, 120])))
    p['classify'] = dict(eval=dict(set='rendered', validation='dev', test_splits=['held_out'], ood_set='rendered',
                                   in_domain_set='rendered'), curves={})
    for key in ('models', 'prompts', 'filters', 'merged', 'recipes', 'quality', 'evaluators', 'laws', 'report'):
        p.pop(key, None)
    p['generate'] = dict(sources={})
    return p

@pytest.mark.slow
def test_a_study_of_pairs_without_classes_is_whole(tmp_path):
    "What it measures is whether an image is told its caption: tables, laws and figures are those of any curve."
    d = copy_repo(tmp_path/'repo')
    make_inputs(d/'data')
    dump(without_classes(), d/'params.yaml')
    sh('git init -q', d)
    assert problems(Study(d)) == []
    made = ran(sh('dvc repro', d))
    assert made == {'prepare', 'data@rendered', 'pools@words', 'clip@pairs_real', 'results', 'laws', 'report'}
    curves, laws = (pd.read_csv(d/'results'/f'{t}.csv') for t in ('curves', 'laws'))
    loss = curves.query("metric == 'loss' and test_set == 'held_out'")
    rows = pd.read_parquet(d/'sets'/'rendered'/'manifest.parquet').query("split == 'held_out'")
    chance = np.log(rows.caption.nunique())
    assert len(loss) == 6 and (loss.n_test == 40).all() and (loss.value < chance+1).all()
    assert set(laws.curve) == {'pairs_real'} and set(laws.test_set) == {'dev', 'held_out'}
    found = pd.read_csv(d/'results'/'pairs.csv').query("task == 'retrieval' and split == 'held_out'")
    assert {'image_to_text_R@1', 'text_to_image_R@10'} <= set(found.metric)
    assert (d/'figures'/'scaling_held_out.png').exists()
    assert ran(sh('dvc repro', d)) == set()

def test_a_study_without_classes_names_the_split_that_has_no_captions():
    p = without_classes()
    p['clip']['retrieval'] = ['held_out']
    found, = problems(Study(ROOT, p))
    assert 'clip.retrieval' in str(found) and "['dev', 'held_out']" in str(found)
