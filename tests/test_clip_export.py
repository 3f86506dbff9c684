"What open_clip_train shows of an exported pool, counted in whole runs of it."
import importlib, itertools, re
from collections import Counter
import numpy as np, open_clip, pytest, torch
from clip_parity import WHOLE, pair_numbers, run_open_clip, small_csv, small_pairs, tiny_model
from conftest import dump
from synthscale.clip_export import (export_pairs, export_pool, line_args, plan_showing, torchrun_line,
                                    write_pairs)
from synthscale.run import main
from synthscale.shards import tar_samples, write_set
from synthscale.study import SECTIONS, Study, StudyError

FAST = ['--lr', '1e-2']

def trained(folder, n, batch, workers, world=1, epochs=2, **how):
    "Export n pairs, run the printed line, and count: how often each pair was shown in each epoch."
    pairs = small_pairs(n)
    export_pairs(pairs, folder/'pool', batch, workers, world, **how)
    model = tiny_model(folder/'model')
    line = torchrun_line(folder/'pool', epochs, model, precision='fp32', extra=FAST)
    processes, args = line_args(line)
    assert processes == world
    runs, tokenizer = run_open_clip(args, folder/'run', world), open_clip.get_tokenizer(model)
    counts = [Counter() for _ in range(epochs)]
    for run in runs:
        for count, batches in zip(counts, run.epochs, strict=True):
            for _, texts in batches:
                count.update(pair_numbers(texts, [c for _, _, c in pairs], tokenizer))
    return runs, counts

@pytest.mark.slow
@pytest.mark.parametrize('n, batch, workers, how', [
    (50, 12, 1, {}), (30, 8, 2, dict(dataset_type='csv', least_batch=5)),
    *(pytest.param(*even, {}, marks=pytest.mark.campaign) for even in ((40, 8, 0), (48, 8, 2)))])
def test_a_run_shows_every_pair_once_an_epoch(tmp_path, n, batch, workers, how):
    "Pools that divide by the batch and that do not, from shards and from files."
    (run,), counts = trained(tmp_path, n, batch, workers, **how)
    assert counts == [Counter(range(n))]*2
    moved = max(float((run.end[k]-v).abs().max()) for k, v in run.start.items() if v.is_floating_point())
    assert moved > 1e-3

@pytest.mark.slow
@pytest.mark.parametrize('kind', ['webdataset', 'csv'])
def test_two_processes_show_every_pair_once(tmp_path, kind):
    "By torchrun with gloo: each pair in one of the processes, and the same weights in both."
    runs, counts = trained(tmp_path, 48, 8, 1, world=2, dataset_type=kind)
    assert counts == [Counter(range(48))]*2
    assert all(torch.equal(v, runs[1].end[k]) for k, v in runs[0].end.items())

@pytest.mark.slow
def test_a_naive_export_shows_other_pairs_than_its_log_says(tmp_path):
    "40 pairs in shards of 20, 12 and 8, two workers: 48 shown, 32 of them different."
    pairs, model = small_pairs(40), tiny_model(tmp_path/'model')
    (tmp_path/'pool').mkdir()
    write_pairs(pairs, tmp_path/'pool', [20, 12, 8])
    args = ['--model', model, '--train-data', f"{tmp_path/'pool'}/pairs-{{000000..000002}}.tar", '--dataset-type',
            'webdataset', '--batch-size', '8', '--epochs', '1', '--workers', '2', '--precision', 'fp32']
    (run,) = run_open_clip(args, tmp_path/'run')
    tokens = torch.cat([texts for _, texts in run.epochs[0]])
    shown = Counter(pair_numbers(tokens, [c for _, _, c in pairs], open_clip.get_tokenizer(model)))
    assert (shown.total(), len(shown)) == (48, 32)
    assert '48/48 (100%)' in (tmp_path/'run'/'logs'/'run'/'out.log').read_text()

@pytest.mark.slow
def test_a_csv_smaller_than_a_batch_saves_an_untrained_model(tmp_path):
    "What the export refuses: open_clip_train itself says nothing."
    args = ['--model', tiny_model(tmp_path/'model'), '--train-data', small_csv(tmp_path/'csv', small_pairs(10)),
            '--dataset-type', 'csv', '--batch-size', '16', '--epochs', '1', '--workers', '0', '--precision', 'fp32']
    (run,) = run_open_clip([*args, *WHOLE], tmp_path/'run')
    assert run.epochs == [] and all(torch.equal(v, run.end[k]) for k, v in run.start.items())
    kept = torch.load(tmp_path/'run'/'logs'/'run'/'checkpoints'/'epoch_1.pt', weights_only=True)
    assert kept['epoch'] == 1 and all(torch.equal(v, run.start[k]) for k, v in kept['state_dict'].items())

@pytest.mark.slow
def test_the_same_batches_come_again(tmp_path):
    "A csv and a seed: the record of a run can be given to another loop, whole images and all."
    data = small_csv(tmp_path/'csv', small_pairs(24))
    args = ['--model', tiny_model(tmp_path/'model'), '--train-data', data, '--dataset-type', 'csv', '--batch-size', '8',
            '--epochs', '1', '--workers', '0', '--precision', 'fp32', '--warmup', '1', *WHOLE]
    (a,), (b,) = (run_open_clip(args, tmp_path/name) for name in 'ab')
    assert len(a.epochs[0]) == 3
    assert all(torch.equal(x, y) for p, q in zip(a.epochs[0], b.epochs[0]) for x, y in zip(p, q))
    assert all(torch.equal(v, b.end[k]) for k, v in a.end.items())
    pixels = {i.numpy().tobytes() for images, _ in a.epochs[0] for i in images}
    assert len(pixels) == 24

def test_the_line_is_one_that_a_shell_does_not_change(tmp_path):
    "Braces are for the trainer; a shell would expand them."
    export_pairs(small_pairs(16), tmp_path/'a pool', 8, 1)
    line = torchrun_line(tmp_path/'a pool', 3)
    assert re.search(r"--train-data '[^']*/a pool/pairs-\{000000\.\.000007\}\.tar'", line)
    assert '--warmup 1 ' in line and '--train-num-samples 16 ' in line

@pytest.fixture
def study(tmp_path):
    "A study with a set of captioned images, two lines each, and a pool of them."
    pytest.importorskip('synthscale.pools', reason='the caption pools are not here')
    if 'clip' not in SECTIONS:
        pytest.skip('params.yaml has no section `clip` yet')
    rng = np.random.default_rng(0)
    samples = [dict(split='train' if i < 24 else 'test', label=i % 2, image=a, caption=f'digit {i}\nthe digit {i}')
               for i, a in enumerate(rng.integers(0, 255, (30, 16, 16, 3), np.uint8))]
    write_set(tmp_path/'sets'/'digits', samples, ['even', 'odd'], shard_size=7)
    p = dict(study=dict(name='small', classes=['even', 'odd']), clip=dict(pools=dict(words=dict(set='digits'))),
             data=dict(sets=dict(digits=dict(type='tiles', input='none'))))
    dump(p, tmp_path/'params.yaml')
    s = Study(tmp_path)
    importlib.import_module('synthscale.pools').write_pool(s, 'words')
    return s

def test_pools_are_exported(study, capsys):
    "From the command line: the line and the counts are printed, and n of any seed is nested."
    out, shown = study.path('out'), []
    for n in (8, 16):
        given = ['clip-export', 'words', 'digits', str(out), '--n', str(n), '--batch-size', '8', '--workers', '2',
                 '--seed', '1', '--study', str(study.dir)]
        assert main(given) == 0
        said = capsys.readouterr().out
        assert f'{n} pairs, {n//8} steps' in said and 'torchrun --nproc_per_node 1 -m open_clip_train.main' in said
        shown.append({key for p in sorted(out.glob('*.tar')) for key, _ in tar_samples(p)})
    assert len(shown[0]) == 8 and shown[0] < shown[1]
    assert main([*given, '--captions', 'each']) == 0
    assert '32 pairs, 4 steps' in capsys.readouterr().out

def test_what_a_pool_cannot_give_is_refused(study, capsys):
    given = ['clip-export', 'words', 'digits', str(study.path('out')), '--study', str(study.dir)]
    for more, message in ((['--n', '25'], 'n is 25: expected 1 to 24'), ([], 'batch_size is 256: expected at most 24'),
                          (['--n', '23', '--batch-size', '8'], 'nearest: 16 or 24')):
        assert main([*given, *more]) == 1
        assert message in capsys.readouterr().err
    assert not study.path('out').exists()

def test_the_arms_of_a_pool_hold_the_same_captions(study):
    "The set of the pool and a source generated from it, n pairs of the same run."
    from synthscale.pools import read_pool
    table, rng = read_pool(study, 'words'), np.random.default_rng(1)
    drawn = [dict(split='train', label=r.label, image=rng.integers(0, 255, (16, 16, 3), np.uint8), caption=r.prompt,
                  prompt=r.prompt, attempts=1) for turn in range(12) for c in range(2)
             for r in [table[table.label == c].iloc[turn]]]
    write_set(study.path('sets', 'made'), drawn, ['even', 'odd'], shard_size=5)
    study.raw['generate'] = dict(sources=dict(made=dict(model='m', prompts='words', guidance_scale=1., n_images=24)))
    study = Study(study.dir, study.raw)
    said = []
    for name in ('digits', 'made'):
        export_pool(study, 'words', name, study.path('out'), 8, n=16, seed=2)
        shards = sorted(study.path('out').glob('*.tar'))
        said.append(sorted(files['txt'].decode() for p in shards for _, files in tar_samples(p)))
    assert said[0] == said[1] and len(set(said[0])) == 16

@pytest.mark.parametrize('world', [1, 2, 3])
@pytest.mark.parametrize('kind', ['webdataset', 'csv'])
def test_every_number_of_pairs_is_shown_once_or_refused_with_numbers_that_are(kind, world):
    for n, batch, workers, accum in itertools.product(range(30, 200), (8, 10), (0, 2, 3), (1, 2)):
        how = dict(workers=workers, world_size=world, accum_freq=accum, dataset_type=kind)
        try:
            plan = plan_showing(n, batch, **how)
        except StudyError as e:
            if 'at most' in str(e):
                assert n < batch*world*accum
                continue
            low, high = map(int, re.search(r'nearest: (\d+) or (\d+)', str(e)).groups())
            assert low < n < high
            for near in {low, high} - {0}:
                assert plan_showing(near, batch, **how).batch_size == batch
            continue
        batches, rest = divmod(n, plan.batch_size*world)
        assert rest == 0 and batches % accum == 0 and .75*batch <= plan.batch_size <= batch and plan.workers <= workers
        if kind == 'csv': continue
        streams = world*max(1, plan.workers)
        assert plan.shards % streams == 0 and n % plan.shards == 0 and n//streams % plan.batch_size == 0
