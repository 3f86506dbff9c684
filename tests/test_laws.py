"""Laws, forecasts and comparisons: what must hold for every curve, on real curves where they are at hand,
and on curves that nobody should have."""
import itertools, json, sys
import numpy as np
import pandas as pd
import pytest
from hypothesis import Phase, assume, given, settings, strategies as st
from conftest import ROOT, sh
from synthscale.checks import check_curve, next_run
from synthscale.exchange import crossover, exchange_rate, fit_mixture
from synthscale.forecast import forecast, make_curve
from synthscale.functional_forms import FORMS, fit_form, fit_joint, fit_rate, fit_tail
from synthscale.laws import compare_slopes, fit_table, forecast_table, measured, seed_slopes
from synthscale.published import published_checkpoints, published_exponents
from synthscale.study import StudyError

SHARED = ROOT.parent/'shared'/'data'
N = 20*2.**np.arange(12)
lawful = settings(max_examples=25, deadline=None)
ks, floors = st.floats(.1, 1.2), st.floats(.05, .5)

def near(got, want, tol=1e-6):
    assert all(abs(got[k]/v-1) < tol for k, v in want.items()), (got, want)

# ---- parameters come back

@given(st.floats(.1, 10), ks)
@lawful
def test_power(b, k):
    near(fit_form(N, b*N**-k, 'power').params, dict(b=b, k=k))

@given(st.floats(.1, 10), ks, floors)
@lawful
def test_floor(b, k, share):
    e = share*b*N[-1]**-k*20                   # a floor that the last sizes see
    near(fit_form(N, e+b*N**-k, 'floor').params, dict(b=b, k=k, e=e))

@given(st.floats(.1, 10), ks, st.floats(50, 5000))
@lawful
def test_m3(b, k, n0):
    near(fit_form(N, b*(1/N+1/n0)**k, 'm3').params, dict(b=b, k=k, g=1/n0))

@given(st.floats(.5, 3), st.floats(.4, 1.2), st.floats(200, 5000), st.floats(.02, .2))
@lawful
def test_rectified(e0, k, n0, e):
    near(fit_form(N, e+(e0-e)/(1+(N/n0)**k), 'rectified').params, dict(e0=e0, k=k, n0=n0, e=e))

@given(st.floats(.4, 1.), st.floats(100, 1000), floors)
@lawful
def test_shifted(k, s, share):
    e = share*(N[-1]+s)**-k*20
    near(fit_form(N, e+(N+s)**-k, 'shifted').params, dict(b=1, k=k, s=s, e=e))

@pytest.mark.parametrize('form', ['floor', 'm3', 'shifted', 'rectified', 'm4', 'bnsl'])
def test_a_parameter_that_nothing_shows_is_not_identified(form):
    f = fit_form(N, 3*N**-.4, form)
    assert f.form.name == 'power' and f.not_identified and abs(f.params['k']-.4) < 1e-9
    assert set(f.params) == {'b', 'k'}

@given(st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_the_fit_is_an_optimum(seed):
    "No neighbour of the fitted shape is better, and more starts find nothing better."
    rng = np.random.default_rng(seed)
    y = (rng.uniform(0, .3)+3*N**-rng.uniform(.1, .6))*np.exp(rng.normal(0, .03, len(N)))
    f, more = fit_form(N, y, 'floor'), fit_form(N, y, 'floor', max_starts=40)
    assert f.rmse <= more.rmse*(1+1e-9)
    if f.form.name == 'floor':
        x = np.log(N)-f.x0

        def sse(t):
            d = np.log(y)-f.form.shape(x, t)
            return np.sum((d-d.mean())**2)

        assert all(sse(f.theta) <= sse(f.theta+d)*(1+1e-9) for d in rng.normal(0, .01, (20, 2)))

# ---- units, order, copies

def noisy(seed, n=N):
    rng = np.random.default_rng(seed)
    return (.05+3*n**-.35)*np.exp(rng.normal(0, .03, len(n)))

@given(st.integers(0, 1000), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.randoms())
@lawful
def test_units_and_order_do_not_matter(seed, per_n, per_loss, random):
    y, order = noisy(seed), list(range(len(N)))
    random.shuffle(order)
    a, b = forecast(N, y).table, forecast(N[order]*per_n, y[order]*per_loss).table
    units = dict(n=per_n, loss=per_loss, ci_lo=per_loss, ci_hi=per_loss, sd_curve=1, sd_noise=1)
    for c, u in units.items():
        np.testing.assert_allclose(b[c], a[c]*u, rtol=1e-6)
    f, g = fit_form(N, y, 'floor'), fit_form(N[order]*per_n, y[order]*per_loss, 'floor')
    assert f.form.name == g.form.name and abs(f.params['k']/g.params['k']-1) < 1e-5
    t, u = fit_tail(N, y), fit_tail(N[order]*per_n, y[order]*per_loss)
    assert abs(t.params['k']-u.params['k']) < 1e-9

@given(st.integers(0, 1000), st.lists(st.integers(0, 35), max_size=8))
@lawful
def test_exact_copies_are_dropped_and_replicates_are_noise(seed, copies):
    rng = np.random.default_rng(seed)
    n, s = np.repeat(N, 3), np.tile([0, 1, 2], len(N))
    y = np.repeat(noisy(seed), 3)*np.exp(rng.normal(0, .05, len(n)))
    one = forecast(make_curve(n, y, s))
    i = np.r_[np.arange(len(n)), copies].astype(int)
    two = forecast(make_curve(n[i], y[i], s[i]))
    assert two.curve.dropped == len(copies) and one.table.equals(two.table)
    assert .02 < one.curve.sd_seed < .08
    wide = forecast(make_curve(n, np.repeat(noisy(seed), 3)*np.exp(rng.normal(0, .3, len(n))), s))
    assert wide.table.sd_seed[0] > one.table.sd_seed[0]

def test_same_input_same_bytes():
    y = noisy(0)
    a, b = (forecast(N, y).table.to_csv() for _ in range(2))
    assert a == b and repr(fit_form(N, y, 'bnsl').params) == repr(fit_form(N, y, 'bnsl').params)

# ---- no curve breaks it

@given(st.lists(st.tuples(st.integers(1, 10**7), st.floats(1e-6, 1e3)), min_size=2, max_size=20))
@settings(max_examples=20, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))     # no shrinking
def test_any_positive_curve_gets_numbers_or_a_reason(rows):
    n, y = map(np.array, zip(*rows))
    assume(len(np.unique(n)) >= 2)
    t = forecast(n, y).table
    assert np.isfinite(t.drop(columns='sd_seed').to_numpy()).all()
    assert (t.ci_lo <= t.loss).all() and (t.loss <= t.ci_hi).all()
    c = make_curve(n, y)
    found = check_curve(c)
    names = [f.code for f in found]
    assert t.sd_seed.isna().all() == ('no replicates' in names)        # the one number that may be missing says why
    assert all(f.code and f.what and f.advice for f in found)
    if len(c.n) < 5:
        assert 'few sizes' in names
    for form in FORMS:
        if len(c.n) >= FORMS[form].n_params:
            f = fit_form(n, y, form)
            assert np.isfinite(f.predict(c.n)).all() and np.isfinite(f.rmse)

@pytest.mark.parametrize('n, y, words', [
    ([], [], 'has no points'),
    ([1, 2], [1, np.nan], 'row 1: loss is nan'),
    ([1, 2], [np.inf, 1], 'row 0: loss is inf'),
    ([1, 2], [1, 0], 'row 1: loss is 0'),
    ([1, -2], [1, 1], 'row 1: size is -2'),
    ([1, 2, 3], [1, 2], '3 sizes and 2 losses'),
    ([5], [1.], '1 size, a forecast needs at least 2'),
    ([5, 5], [1., 2.], '1 size'),
])
def test_values_that_no_curve_has(n, y, words):
    seed = np.arange(len(n)) if len(n) == len(y) else None
    with pytest.raises(StudyError, match='curve') as e:
        forecast(make_curve(n, y, seed=seed, name='mine'))
    assert words in str(e.value) and 'mine' in str(e.value)

def codes(y, n=N, **k):
    return [f.code for f in check_curve(make_curve(n[:len(y)], y, **k))]

def test_findings_have_names():
    assert codes([1.]) == ['one size'] and 'few sizes' in codes([1., .9]) and 'short span' in codes([1., .9])
    assert 'constant' in codes(np.ones(12)) and 'rising' in codes(N**.2)
    assert 'floor not identified' in codes(3*N**-.4*np.exp(np.random.default_rng(0).normal(0, .01, 12)))
    assert 'floor not identified' not in codes(.5+3*N**-.6)

def test_a_law_needs_as_many_sizes_as_parameters():
    with pytest.raises(StudyError, match="expected at least 6 for the law 'bnsl'"):
        fit_form(N[:5], N[:5]**-.3, 'bnsl')
    with pytest.raises(StudyError, match="no law 'flor'.*did you mean 'floor'"):
        fit_form(N, N**-.3, 'flor')
    with pytest.raises(StudyError, match='row 2: error rate is 1.5'):
        fit_rate([1, 2, 3], [.1, .2, 1.5], 100, .9)
    with pytest.raises(StudyError, match='from the largest, 100, on; asked for 50'):
        forecast([50, 100], [1, .9], at=[50])

def test_rates_know_their_test_set():
    "The same rates measured on fewer images say less; without any error there is still a number."
    p = .02+.88/(1+(N/300)**.7)
    big, small = (fit_rate(N, np.round(p*m)/m, m, .9) for m in (10000, 100))
    assert small.sd(N, False).mean() > 3*big.sd(N, False).mean()
    df = pd.DataFrame(dict(metric='top1', value=[.5, 1.], n_test=100))
    m = measured(df, 'top1')
    assert m.value.tolist() == [.5, .005] and m.stderr[0] == .05

# ---- comparisons

def pair(seed, k_a=.4, k_b=.4, ratio=4., seeds=5, sd=.03):
    rng = np.random.default_rng(seed)
    rows = []
    for s in range(seeds):
        shared = rng.normal(0, sd)
        for c, unit, k in (('a', 1, k_a), ('b', ratio, k_b)):
            for n in 50*2.**np.arange(8):
                value = (n/unit)**-k*np.exp(shared+rng.normal(0, sd))
                rows.append(dict(curve=c, test_set='t', seed=s, n=n, n_images=n, value=value))
    return pd.DataFrame(rows)

def test_exchange_intervals_hold_the_true_rate():
    rates = [exchange_rate(pair(s), 'a', 'b').query("bound == '='") for s in range(40)]
    hold = [r.eval('ci_lo < 4 < ci_hi').mean() for r in rates]
    assert .88 < np.mean(hold) <= 1

def test_equal_exponents_are_rarely_called_different():
    def differ(p):
        a, b = (seed_slopes(p[p.curve == c]) for c in 'ab')
        return compare_slopes(a, b)['verdict'] == 'differ'

    called = [differ(pair(s, seeds=3)) for s in range(100)]
    assert np.mean(called) < .12

def test_a_crossover_that_comes_and_one_that_never_does():
    comes = [crossover(pair(s, .2, .4, 200.), 'a', 'b', below=1e7) for s in range(10)]
    never = [crossover(pair(s, .4, .4, 4.), 'a', 'b', below=1e5) for s in range(10)]
    assert np.mean([c['p_never'] for c in comes]) < .3 and np.mean([c['p_never'] for c in never]) > .7
    assert all(c['lower'] == 'a' for c in never)
    with pytest.raises(StudyError, match='asked below 100'):
        crossover(pair(0), 'a', 'b', below=100)

def test_rates_where_curves_do_not_overlap_are_bounds():
    p = pair(0)
    p.loc[p.curve == 'b', 'value'] += 5
    e = exchange_rate(p, 'a', 'b')
    assert set(e.bound) == {'>'} and e.ci_lo.isna().all() and (e.rate > .99).all()

def test_mixture_that_adds_nothing_and_one_that_counts_fully():
    def grid(rho):
        rows = []
        for k, r, s in itertools.product(range(4), (50, 200, 800), (0, 500, 4000)):
            noise = np.exp(np.random.default_rng([k, r, s]).normal(0, .02))
            rows.append(dict(seed=k, n_real=r, n_synthetic=s, value=2*(r+rho*s)**-.4*noise))
        return pd.DataFrame(rows)

    assert 'not shown' in fit_mixture(grid(0))['verdict']
    assert 'as much as a real one' in fit_mixture(grid(1))['verdict']
    with pytest.raises(StudyError, match='found 1 and'):
        fit_mixture(grid(1).query('n_real == 50'))

def test_tables_of_a_study_have_no_unexplained_nan():
    f, found = forecast_table(pair(0), ['a', 'b'])
    assert f.notna().all().all() and set(f.curve) == {'a', 'b'}

def test_missing_seeds_and_values_are_no_slopes_and_no_rates():
    p = pair(0)
    few = p[~((p.curve == 'a') & (p.seed == 2) & (p.n > 50))]
    laws, _ = fit_table(few.assign(metric='loss'), compare=[['a', 'b']])
    a = laws[laws.curve == 'a'].iloc[0]
    assert a.n_seeds == 4 and a.ci_lo < .4 < a.ci_hi and a.ci_hi-a.ci_lo < .2
    assert len(exchange_rate(few, 'a', 'b')) == 1                          # one size that all shared seeds have
    for bad in (np.nan, 0.):
        q = p.copy()
        q.loc[0, 'value'] = bad
        for f in (exchange_rate, crossover):
            with pytest.raises(StudyError, match="curve 'a': row 0: loss is"):
                f(q, 'a', 'b')
    with pytest.raises(StudyError, match='no seed in common'):
        exchange_rate(p.assign(seed=p.seed+10*(p.curve == 'a')), 'a', 'b')
    with pytest.raises(StudyError, match='top1 is 75.3'):
        measured(pd.DataFrame(dict(metric='top1', value=[75.3], n_test=100)), 'top1')

@given(st.integers(0, 1000), st.booleans())
@lawful
def test_more_runs_never_cost_knowledge(seed, twice):
    n = np.repeat(N, 1+twice)
    y = 3*n**-.3*np.exp(np.random.default_rng(seed).normal(0, .03, len(n)))
    c = make_curve(n, y, seed=np.tile(range(1+twice), len(N)))
    by = next_run(c, seeds=(1, 3)).pivot(index='n', columns='seeds', values='saved')
    assert (by[1] > 0).all() and (by[3] > by[1]).all()

# ---- the field's numbers

def test_published_tables_are_those_of_the_project():
    if not SHARED.exists():
        pytest.skip('the shared data folder is not here')
    c, k = pd.read_csv(SHARED/'published_checkpoints.csv'), pd.read_csv(SHARED/'published_exponents.csv')
    pd.testing.assert_frame_equal(published_checkpoints(), c.drop(columns='nll_note'))
    pd.testing.assert_frame_equal(published_exponents(), k)

def test_chinchilla_has_one_optimum():
    f = SHARED/'curves'/'chinchilla'/'svg_extracted_data.csv'
    if not f.exists():
        pytest.skip('the Chinchilla points (shared data folder) are not here')
    d = pd.read_csv(f).sort_values('loss').iloc[:-5]
    N, D = d['Model Size'].to_numpy(), (d['Training FLOP']/6/d['Model Size']).to_numpy()
    starts = itertools.product(np.arange(0, 2.5, .5), np.arange(0, 2.5, .5))
    fits = [fit_joint(N, D, d.loss.to_numpy(), start) for start in starts]
    assert all(abs(f['huber']-.0010183) < 1e-7 and abs(f['share']-.514) < 5e-4 for f in fits)

def test_the_benchmark_reads_every_form_it_documents(tmp_path):
    long = [dict(curve=c, n=n, value=v, domain='mine') for c in 'ab' for n, v in zip(N, noisy(ord(c)))]
    seen = [{'Domain': 'IC', 'Task': 'birds_10', 'Model': m, 'Training': int(i < 9), 'Loss': v, 'Seen Examples': n}
            for m in 'xy' for i, (n, v) in enumerate(zip(N, noisy(ord(m))))]
    wide = [{'config name': m} | {f'{n:.0f}': v for n, v in zip(N, noisy(i))} for i, m in enumerate('pqr')]
    for name, rows in dict(long=long, seen=seen, wide=wide).items():
        pd.DataFrame(rows).to_csv(tmp_path/f'{name}.csv', index=False)
    printed = sh([sys.executable, str(ROOT/'benchmarks'/'laws.py'), str(tmp_path)], ROOT)
    out = json.loads(printed.strip().splitlines()[-1])
    assert {k: v['curves'] for k, v in out['domains'].items()} == dict(mine=2, IC=2, wide=3)
    for d in out['domains'].values():
        assert {'synthscale', 'tail', 'persist', *FORMS, 'm1_ref', 'm2_ref', 'm3_ref', 'm4_ref'} <= set(d)
        assert 0 < d['synthscale']['rmsle'] < .2 and d['synthscale']['coverage'] >= .5
