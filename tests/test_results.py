"Tables and laws: properties that hold for all inputs, and what is refused."
import json, re
from contextlib import nullcontext
import numpy as np, pandas as pd, pytest
from hypothesis import assume, given, settings, strategies as st
from conftest import ROOT, copy_repo, sh
from synthscale.components import METRICS_FITTED, read_images
from synthscale.study_curves import curves_of
from synthscale.laws import compare_slopes, equivalent, fit_curve, fit_ranges, fit_study, fit_table, seed_slopes
from synthscale.page import write_page
from synthscale.report import make_report
from synthscale.results import _run_with, compute_marks, prune, read_curves, read_table, summary, t_interval
from synthscale.study import Study, StudyError

exponents, scales = st.floats(.01, 2), st.floats(1e-3, 1e3)
sizes = st.lists(st.integers(1, 10**6), min_size=2, max_size=8, unique=True)

def table(n, k, a=1., seeds=3, jitter=0.):
    rng = np.random.default_rng(0)
    return pd.DataFrame([dict(curve='c', test_set='test', metric='loss', seed=s, n_images=m, n=float(m),
                              value=a*m**-k*np.exp(rng.normal(0, jitter))) for s in range(seeds) for m in n])

@given(sizes, exponents, scales)
@settings(deadline=None)
def test_a_noiseless_law_comes_back(n, k, a):
    f = fit_curve(table(n, k, a))
    assert f['k'] == pytest.approx(k, abs=1e-6) and f['ci_lo'] == pytest.approx(k, abs=1e-5)
    assert f['loss_mid'] == pytest.approx(a*f['n_mid']**-k, rel=1e-6)

@given(sizes, exponents, scales, scales)
@settings(max_examples=40, deadline=None)
def test_units_and_row_order_do_not_matter(n, k, unit_n, unit_loss):
    t = table(n, k, jitter=.1)
    f, g = fit_curve(t), fit_curve(t.assign(n=t.n*unit_n, value=t.value*unit_loss).sample(frac=1, random_state=1))
    for key in ('k', 'ci_lo', 'ci_hi', 'heldout_rmsle'):
        assert g[key] == pytest.approx(f[key], rel=1e-6, abs=1e-8, nan_ok=True)

@given(sizes)
@settings(deadline=None)
def test_the_mean_of_seed_slopes_is_the_slope_through_all_points(n):
    t = table(n, .4, jitter=.2)
    assert fit_curve(t)['k'] == pytest.approx(seed_slopes(t).mean(), rel=1e-9, abs=1e-12)

def test_one_seed_has_the_lines_interval_and_two_points_none():
    assert fit_curve(table([1, 2, 4, 8], .3, seeds=1, jitter=.1))['interval'] == 'line'
    assert np.isnan(fit_curve(table([1, 8], .3, seeds=1))['ci_lo'])
    with pytest.raises(StudyError, match="curve 'c': 1 sizes"):
        fit_curve(table([5], .3), 'c')

@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6))
def test_a_difference_is_called_only_if_its_interval_excludes_zero(d):
    a = pd.Series(d)
    r = compare_slopes(a, a*0)
    assert (r['verdict'] == 'differ') == (r['ci_lo'] > 0 or r['ci_hi'] < 0)

def test_disjoint_seeds_are_not_compared():
    assert compare_slopes(pd.Series([1., 2.], [0, 1]), pd.Series([1., 2.], [2, 3]))['verdict'] == 'not shown'

@given(sizes, exponents, st.floats(.05, .95))
def test_equivalent_reads_the_curve(n, k, where):
    n = sorted(n)
    target = n[0]**(1-where)*n[-1]**where
    got, sign = equivalent(target**-k, n, [m**-k for m in n])
    assert sign == '=' and got == pytest.approx(target, rel=1e-6)
    losses = [m**-k for m in n]
    assert equivalent(2*n[0]**-k, n, losses)[1] == '<' and equivalent(n[-1]**-k/2, n, losses)[1] == '>'

@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_t_interval_is_scipys(v):
    from scipy import stats
    assume(np.std(v) > 1e-6)
    m, lo, hi = t_interval(v)
    assert (lo, hi) == pytest.approx(stats.t.interval(.95, len(v)-1, np.mean(v), stats.sem(v)), rel=1e-6, abs=1e-9)

def test_a_table_without_loss_or_with_unknown_curves():
    t = table([1, 2], .3)
    with pytest.raises(StudyError, match="no row has metric"):
        fit_table(t.assign(metric='top1'))
    with pytest.raises(StudyError, match="names 'd': no such curve"):
        fit_table(t, {'d': [1, 2]})

def test_every_point_has_one_of_three_marks():
    t = table([10, 20, 40], .3).assign(n_real=lambda d: d.n_images, n_synthetic=0)
    at = [dict(curve='c', n_images=n, n_real=n, n_synthetic=0, test_set='test', metric='loss', compute=mark)
          for n, mark in ((20, 'limited'), (40, 'checked'))]
    marks = summary(t, pd.DataFrame(at)).set_index('n_images').compute.to_dict()
    assert marks == {10: 'not checked', 20: 'limited', 40: 'checked'}

def test_a_noisy_move_limits_no_point():
    noisy = [dict(curve='c', n_images=n, n_real=n, n_synthetic=0, test_set='test', metric='loss', seed=s, once=1.,
                  doubled=1+d) for n, moves in ((10, (.5, -.4)), (20, (.06, .04))) for s, d in enumerate(moves)]
    assert compute_marks(pd.DataFrame(noisy), .03).compute.tolist() == ['checked']*2
    quiet = [r | dict(doubled=1+(r['doubled']-1)/50+(.05 if r['n_images'] == 20 else 0)) for r in noisy]
    assert compute_marks(pd.DataFrame(quiet), .03).compute.tolist() == ['checked', 'limited']

def test_prune_keeps_what_is_named(tmp_path):
    for n in ('a', 'b'):
        (tmp_path/n).mkdir()
        (tmp_path/f'{n}.ipynb').touch()
    assert sorted(prune(tmp_path, ['a'])) == ['b', 'b.ipynb']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'a.ipynb']

def kept_images(folder):
    "The losses of single images, which intervals cover too: DVC keeps them, and brings them where they are not."
    path = ROOT/'results'/'images.parquet'
    if not path.exists():
        d = copy_repo(folder/'repo', skip=())
        sh('git init -q && dvc pull -q results/images.parquet', d)
        path = d/'results'/'images.parquet'
    return read_images(path)

def test_the_committed_results_say_the_same_everywhere(tmp_path):
    "headline.json, laws.csv and comparisons.csv are what the committed curves.csv gives, in every metric."
    s, images = Study(ROOT), kept_images(tmp_path)
    df, ranges = read_curves(ROOT/'results'/'curves.csv'), fit_ranges(s)
    fitted = {n for n, c in curves_of(s).items() if not (c.real and c.synthetic) and len(c.sizes) > 1}
    assert set(ranges) == fitted | set(s.laws.fit_range)
    h = json.loads((ROOT/'results'/'headline.json').read_text())
    kept = {name: pd.read_csv(ROOT/'results'/f'{name}.csv') for name in ('laws', 'comparisons')}
    assert {*kept['laws'].metric} == {*METRICS_FITTED} and s.laws.metric in METRICS_FITTED
    for metric in METRICS_FITTED:
        leads = metric == s.laws.metric
        tables = fit_table(df, ranges, s.laws.x, s.laws.compare, metric, images, s.laws.primary if leads else ())
        for fitted, committed in zip(tables, kept.values()):
            committed = committed[committed.metric == metric].reset_index(drop=True)
            assert len(fitted) and set(fitted.metric) == {metric}
            pd.testing.assert_frame_equal(fitted, committed, rtol=1e-6)
        if not leads: continue
        for l in tables[0].itertuples():
            assert h['k'][l.curve][l.test_set]['k'] == pytest.approx(l.k, abs=6e-4)

def test_the_tables_of_cifar10_follow_from_its_committed_points():
    "Its points are stored nowhere else, so that no stage makes these tables again here."
    folder = ROOT/'studies'/'cifar10'
    s, df = Study(folder), read_curves(folder/'results'/'curves.csv')
    for metric in METRICS_FITTED:
        tables = fit_table(df, fit_ranges(s), s.laws.x, s.laws.compare, metric)
        for fitted, name in zip(tables, ('laws', 'comparisons')):
            committed = pd.read_csv(folder/'results'/f'{name}.csv')
            committed = committed[committed.metric == metric].reset_index(drop=True)
            assert len(committed)
            pd.testing.assert_frame_equal(fitted.replace('', np.nan), committed, rtol=1e-6)

def test_no_stage_is_taken_for_one_that_is_gone():
    "The stage results deletes the costs of removed stages: each that writes some is known to it."
    text = (ROOT/'dvc.yaml').read_text()
    writes = {m for m in re.findall(r'runs/costs/([a-z_]+)-[$][{]key[}].json', text)}
    assert len(writes) > 10 and writes <= {*_run_with(Study(ROOT))}

@pytest.mark.slow
@pytest.mark.parametrize('where, value', [('largest', 0.), ('all', 0.), ('all', 1e-12)])
def test_losses_of_nothing_leave_a_study_its_tables_and_its_report(repo, where, value):
    "An easy task: every image is named right without a doubt, at the largest sizes or at all; nothing has a logarithm."
    study = Study(repo)
    tables = {f: read_table(repo/'results'/f) for f in ('curves.csv', 'images.parquet', 'per_class.parquet')}
    def top(t):
        "The rows of the largest size of each curve, or all."
        return t.n_images >= (t.groupby('curve').n_images.transform('max') if where == 'largest' else 0)
    for f in ('curves.csv', 'per_class.parquet'):
        t = tables[f]
        t.loc[top(t) & t.metric.isin(['loss', 'loss_calibrated']), 'value'] = value if f == 'curves.csv' else 0.
    images = tables['images.parquet']
    for k in ('loss', 'loss_calibrated'):
        images[k] = [np.zeros_like(v) if here else v for v, here in zip(images[k], top(images))]
    tables['curves.csv'].to_csv(repo/'results'/'curves.csv', index=False)
    for f in ('images.parquet', 'per_class.parquet'):
        tables[f].to_parquet(repo/'results'/f)
    laws = fit_study(study)
    if value == 0:
        make_report(study)
        write_page(study)
        assert 'scaling_test.png' in {f.name for f in study.path('figures').iterdir()}
    known = laws[laws.curve.isin(study.report.scaling) & (laws.metric == study.laws.metric)]
    assert len(known) and known.k.isna().all() == (where == 'all' and value == 0)
    with pytest.raises(StudyError, match='a number above 0') if value == 0 else nullcontext():
        read_curves(repo/'results'/'curves.csv')            # a table of one's own
