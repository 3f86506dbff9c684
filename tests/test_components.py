"""Intervals over seeds, test images and generators: what they cover, what must not change them, and what is declared
before it is known."""
import itertools
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from conftest import ROOT, load
from synthscale.classes import class_groups
from synthscale.components import (Contrast, banerjee, check_images, contrast, effect, holm, image_losses, paired,
                                   read_images, run_contrast, satterthwaite, slope_rows, slope_weights, type_verdict,
                                   verdict, whole_sizes)
from synthscale.laws import LawsSection, compare_curves, fit_curve, fit_table, local_slopes, measured
from synthscale.params import check_study
from synthscale.primary import PRIMARY, PrimaryComparison, primary_problems, primary_table
from synthscale.study import Study, StudyError, validated

N = np.array([50., 200, 800])
lawful = settings(max_examples=25, deadline=None)
seeds_of_chance = st.integers(0, 2**31)

def losses(seed, runs=4, images=60, k=.3):
    "Losses of single images: runs x sizes x images."
    rng = np.random.default_rng(seed)
    hard = rng.normal(size=images)
    return N[:, None]**-k*np.exp(hard+.3*rng.normal(size=(runs, 3, images))+.05*rng.normal(size=(runs, 3, 1)))

def numbers(e):
    "What an effect says in numbers."
    return [e[k] for k in ('estimate', 'ci_lo', 'ci_hi', 'p', 'df', 'sd_seeds', 'sd_images')]

def same(a, b):
    np.testing.assert_allclose(numbers(a), numbers(b), rtol=1e-9, atol=1e-12)

# ---- what changes nothing

@given(seeds_of_chance, st.floats(1e-3, 1e3))
@lawful
def test_neither_the_order_of_runs_and_images_nor_the_unit_of_the_loss_matters(seed, unit):
    L, rng = losses(seed), np.random.default_rng(seed)
    w = slope_weights(N)
    e = effect([contrast(L, w)])
    same(e, effect([contrast(L[rng.permutation(4)], w)]))
    same(e, effect([contrast(L[..., rng.permutation(60)], w)]))
    same(e, effect([contrast(unit*L, w)]))
    same(e, effect([contrast(L, slope_weights(N*unit))]))

@given(seeds_of_chance)
@lawful
def test_the_other_way_round_is_the_same_with_the_other_sign(seed):
    a, b = (contrast(losses(seed+i), slope_weights(N)) for i in range(2))
    for one, other in ((effect([a], [b]), effect([b], [a])), (effect([paired(a, b)]), effect([paired(b, a)]))):
        assert (one['estimate'], one['ci_lo'], one['ci_hi']) == pytest.approx(
            (-other['estimate'], -other['ci_hi'], -other['ci_lo']))
        assert one['p'] == pytest.approx(other['p']) and one['df'] == pytest.approx(other['df'])

@given(seeds_of_chance)
@lawful
def test_without_images_it_is_students_interval_and_welchs(seed):
    a, b = (contrast(losses(seed+i, runs).mean(-1), slope_weights(N)) for i, runs in ((0, 5), (1, 3)))
    e = effect([a])
    assert (e['ci_lo'], e['ci_hi']) == pytest.approx(stats.t.interval(.95, 4, a.value.mean(), stats.sem(a.value)))
    assert e['p'] == pytest.approx(stats.ttest_1samp(a.value, 0).pvalue)
    welch = stats.ttest_ind(a.value, b.value, equal_var=False)
    assert effect([a], [b])['p'] == pytest.approx(welch.pvalue) and effect([a], [b])['df'] == pytest.approx(welch.df)

@given(seeds_of_chance)
@lawful
def test_the_influence_of_an_image_is_what_one_more_copy_of_it_moves(seed):
    L, w = losses(seed, images=4000), slope_weights(N)
    c = contrast(L, w)
    more = np.concatenate([L, L[..., :1]], -1)
    moved = contrast(more, w).value-c.value
    np.testing.assert_allclose(moved*4001, c.influence[:, 0], rtol=.02, atol=1e-3)

@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.integers(1, 300)), min_size=1, max_size=5))
@lawful
def test_degrees_of_freedom_lie_between_the_least_and_the_sum(parts):
    least, total = min(df for _, df in parts), sum(df for _, df in parts)
    assert least*(1-1e-9) <= satterthwaite(parts) <= total*(1+1e-9)
    assert least*(1-1e-6) <= banerjee(parts)

@given(st.lists(st.floats(0, 1), max_size=12))
@lawful
def test_holm_is_that_of_statsmodels(p):
    from statsmodels.stats.multitest import multipletests
    want = multipletests(p, method='holm')[1] if p else []
    np.testing.assert_allclose(holm(p), want)
    np.testing.assert_allclose(holm([*p, np.nan])[:-1], want)

# ---- what they cover

def study(rng, seeds, k, images, gen=0.):
    "A contrast of each generator of an arm: seeds, shared test images and generators vary."
    out = []
    for s in seeds:
        own = rng.normal(0, .015*gen)
        mean = -(k+own)*np.log(N)[:, None]+rng.normal(0, .045, (s, 3, 1))
        out.append(contrast(np.exp(mean+np.array([.8, .95, 1.1])[:, None]*images
                                   +.4*rng.normal(size=(s, 3, len(images)))), slope_weights(N)))
    return out

@pytest.mark.parametrize('seeds', [[5], [3], [5, 2, 2]], ids=str)
def test_intervals_cover_what_they_say(seeds):
    rng, shift = np.random.default_rng(3), slope_weights(N)@np.array([.8, .95, 1.1])**2/2
    held = []
    for _ in range(300):
        arm = study(rng, seeds, .2, rng.normal(size=300), len(seeds) > 1)
        e = effect(arm)
        held.append(e['ci_lo'] <= .2+shift <= e['ci_hi'])
    assert .90 < np.mean(held) < .995

def test_generators_widen_an_interval_and_are_named():
    rng = np.random.default_rng(4)
    arm = study(rng, [5, 2, 2], .2, rng.normal(size=300), 3.)
    wide, narrow = effect(arm), effect(arm, generators=False)
    assert (wide['covers'], narrow['covers']) == ('seeds, images, generators', 'seeds, images')
    assert wide['ci_hi']-wide['ci_lo'] > narrow['ci_hi']-narrow['ci_lo'] and wide['n_generators'] == 3
    assert wide['estimate'] == pytest.approx(np.mean([c.value.mean() for c in arm]))     # not the mean of nine runs
    total = sum(wide[f'sd_{p}']**2 for p in ('seeds', 'images', 'generators'))
    assert np.sqrt(total)*stats.t.ppf(.975, wide['df']) == pytest.approx(wide['ci_hi']-wide['estimate'])

def test_equal_arms_are_rarely_called_different():
    rng, said = np.random.default_rng(5), []
    for _ in range(200):
        images = rng.normal(size=100)
        a, b = (study(rng, [5], .2, images)[0] for _ in range(2))
        said.append(verdict(effect([paired(a, b)])))
    assert np.mean([s == 'not shown' for s in said]) > .9

def test_what_cannot_be_known_is_not_given():
    one = effect([Contrast((0,), np.array([.3]))])
    assert np.isnan([one['ci_lo'], one['p'], one['df']]).all() and one['covers'] == ''
    assert verdict(one) == 'not shown'
    with pytest.raises(StudyError, match='no seed'):
        effect([Contrast((), np.array([]))])
    a, b = (contrast(losses(0, images=n), slope_weights(N)) for n in (60, 50))
    for both in (lambda: paired(a, b), lambda: effect([a], [b])):
        with pytest.raises(StudyError, match='the same test set'):
            both()

@given(st.lists(st.floats(.1, .5), min_size=1, max_size=4), st.lists(st.floats(.1, .5), min_size=1, max_size=4),
       seeds_of_chance)
@lawful
def test_a_claim_about_kinds_ends_in_two_ways_only(a, b, seed):
    rng = np.random.default_rng(seed)
    arms = [[Contrast((0, 1, 2), rng.normal(m, .01, 3)) for m in means] for means in (a, b)]
    t = type_verdict(*arms)
    assert t['verdict'] in ('these models', 'not shown') and t['models'] == f'{len(a)} and {len(b)}'
    assert (t['beyond'] == 'unknown') == (len(a) == len(b) == 1)

# ---- tables

def table(seed=0, curves=('a', 'b'), ks=(.4, .2), runs=3, test_set='test', n_test=80):
    "Rows of curves.csv, and of images.parquet."
    rng = np.random.default_rng(seed)
    hard, rows, lists = rng.normal(size=n_test), [], []
    for (c, k), n, s in itertools.product(zip(curves, ks), N, range(runs)):
        v = n**-k*np.exp(hard+.3*rng.normal(size=n_test)+rng.normal(0, .03))
        right = (v < .15).astype(int)
        run = dict(curve=c, n_images=int(n), n_real=0, n_synthetic=int(n), seed=s, test_set=test_set)
        lists.append(run | dict(loss=v, loss_calibrated=.9*v, top1=right))
        rows += [run | dict(metric=m, value=x, n_test=n_test)
                 for m, x in (('loss', v.mean()), ('loss_calibrated', .9*v.mean()), ('top1', right.mean()))]
    return pd.DataFrame(rows), pd.DataFrame(lists)

def test_every_metric_of_a_study_has_its_images():
    df, images = table()
    for m in ('loss', 'loss_calibrated', 'error'):
        laws, pairs = fit_table(df, compare=[['a', 'b']], metric=m, images=images)
        assert set(laws.covers) == set(pairs.covers) == {'seeds, images'} and set(laws.n_test) == {80}
        assert set(laws.metric) == {m}
    plain, scaled = (fit_table(df, metric=m, images=images)[0] for m in ('loss', 'loss_calibrated'))
    np.testing.assert_allclose(plain.k, scaled.k)                         # a constant factor leaves k
    seeds_alone = fit_table(df)[0]
    assert set(seeds_alone.covers) == {'seeds'} and (seeds_alone.k == plain.k).all()
    assert (plain.ci_hi-plain.ci_lo > 0).all() and not (plain.ci_lo == seeds_alone.ci_lo).any()

def test_a_curve_without_images_says_so():
    df, images = table()
    laws, pairs = fit_table(df, compare=[['a', 'b']], images=images[images.curve == 'a'])
    assert laws.set_index('curve').covers.to_dict() == {'a': 'seeds, images', 'b': 'seeds'}
    assert pairs.covers.tolist() == ['seeds']

def test_a_file_of_images_is_checked(tmp_path):
    df, images = table()
    path = tmp_path/'images.parquet'
    assert read_images(path) is None
    images.to_parquet(path)
    check_images(read_images(path), df)
    images.assign(loss=[v*1.1 for v in images.loss]).to_parquet(path)
    with pytest.raises(StudyError, match=r"'curve': 'a', 'n_images': 50.*as in curves.csv"):
        check_images(read_images(path), df)
    images.assign(loss=[v[:-1] if i == 3 else v for i, v in enumerate(images.loss)]).to_parquet(path)
    with pytest.raises(StudyError, match="'test' have lengths"):
        read_images(path)
    images.drop(columns='top1').to_parquet(path)
    with pytest.raises(StudyError, match="column 'top1' is missing"):
        read_images(path)

def test_no_error_at_all_leaves_the_size_out_and_says_so():
    df, images = table()
    df.loc[(df.metric == 'top1') & (df.n_images == 800) & (df.seed == 1), 'value'] = 1.
    laws, _ = fit_table(df, metric='error')
    assert set(laws.left_out) == {'800 (value 0)'} and set(laws.n_hi) == {200}
    df.loc[(df.metric == 'top1') & (df.n_images == 200), 'value'] = 1.
    laws, pairs = fit_table(df, metric='error', compare=[['a', 'b']])
    assert laws.k.isna().all() and len(pairs) == 0
    assert (measured(df, 'top1').value > 0).all()                         # half an image, in tables of one's own

def curve(df, name, metric='loss'):
    return df[(df.curve == name) & (df.metric == metric)].assign(n=lambda d: d.n_images)

def test_ragged_seeds_are_fitted_over_what_all_have_or_refused():
    df = curve(table()[0], 'a')
    short = df[(df.n < 800) | (df.seed == 0)]
    f = fit_curve(short, 'a')
    assert (f['left_out'], f['n_hi'], f['n_seeds'], f['n_points']) == ('800', 200, 3, 6)
    assert f['k'] == pytest.approx(fit_curve(df[df.n < 800])['k'])
    apart = df[((df.seed == 0) & (df.n < 800)) | ((df.seed == 1) & (df.n > 50))]
    with pytest.raises(StudyError, match=r"curve 'a': its 2 seeds .*50 \(1\), 200 \(2\), 800 \(1\)"):
        fit_curve(apart, 'a')
    assert whole_sizes(df.drop_duplicates('n').assign(seed=[0, 1, 2]))[1] == []      # every run a seed of its own

def test_exponents_are_compared_over_sizes_that_both_have():
    df, _ = table(ks=(.3, .3))
    a, b = curve(df, 'a'), curve(df, 'b')
    bent = a.assign(value=a.value*np.where(a.n == 800, 3., 1.))           # the first curve's last point is far off
    assert compare_curves(bent, b[b.n < 800])['n_hi'] == 200
    assert compare_curves(bent, b[b.n < 800])['difference'] == pytest.approx(
        compare_curves(a[a.n < 800], b[b.n < 800])['difference'])
    nothing = compare_curves(a, b[b.n > 700])
    assert nothing['verdict'] == 'not shown' and np.isnan(nothing['difference'])

def test_local_slopes_sum_to_the_line():
    df = curve(table()[0], 'a')
    steps = local_slopes(df)
    assert [(s['n_lo'], s['n_hi']) for s in steps] == [(50, 200), (200, 800)]
    assert np.mean([s['k'] for s in steps]) == pytest.approx(fit_curve(df)['k'])      # equal steps of log n

def test_a_repeated_run_is_no_second_seed():
    df = curve(table()[0], 'a')
    with pytest.raises(StudyError, match='repeat a seed'):
        run_contrast(slope_rows(pd.concat([df, df[:1]])))

# ---- declared comparisons

def declared(**update):
    return PrimaryComparison(**dict(name='gap', kind='exponent', a='a', b='b', test_set='test') | update)

def test_a_declared_comparison_is_a_row_with_its_verdict():
    df, images = table(curves=('a', 'b', 'b1', 'b2'), ks=(.5, .2, .21, .19))
    loss, by_run = df[df.metric == 'loss'].assign(n=df.n_images), image_losses(images, 'loss')
    kinds = declared(name='kinds', generators_b=['b', 'b1', 'b2'])
    t = primary_table([declared(), declared(name='at', kind='ratio', n=[800]), kinds], loss, by_run=by_run)
    assert list(t) == PRIMARY and t.verdict.tolist() == ['differ', 'lower', 'these models']
    assert t.covers.tolist() == ['seeds, images', 'seeds, images', 'seeds, images, generators']
    assert t.models.tolist() == ['', '', '- and 3'] and (t.p_holm >= t.p).all()
    assert t.estimate[1] == pytest.approx(800**-.3, rel=.2) and t.n.tolist() == ['50 to 800', '800', '50 to 800']
    gap = fit_table(df, compare=[['a', 'b']], images=images, primary=[declared()])[1].iloc[0]
    assert (gap.role, np.isnan(gap.p_holm)) == ('primary', True)
    assert (gap.difference, gap.p) == pytest.approx((t.estimate[0], t.p[0]))

def test_gains_are_paired_with_the_same_real_images_alone():
    rng, rows = np.random.default_rng(0), []
    for s, added in itertools.product(range(4), (0, 400)):
        n = 50+added
        rows.append(dict(curve='m', test_set='test', n_images=n, n_real=50, n_synthetic=added, seed=s, n=n,
                         value=(.5+.2*s)*(.8 if added else 1)*np.exp(rng.normal(0, .01))))
    p = declared(kind='gain', a='m', b='m', n=[50, 400])
    t = primary_table([p], pd.DataFrame(rows)).iloc[0]
    assert t.verdict == 'helps' and t.ci_lo < .8 < t.ci_hi and t.ci_hi-t.ci_lo < .1       # levels of the seeds cancel

@pytest.mark.parametrize('update, words', [
    (dict(a='c'), "is about 'c': no such curve"), (dict(test_set='tset'), "did you mean 'test'?"),
    (dict(n=[50]), 'n is [50]: expected none'), (dict(kind='ratio'), 'n is []: expected [size]'),
    (dict(kind='ratio', n=[70]), "curve 'a' has no point of 70 images"),
    (dict(generators_a=['b']), "does not name 'a'"),
    (dict(generators_a=['a', 'a']), 'twice'), (dict(paired=True, generators_a=['a']), 'lists of equal length'),
    (dict(kind='gain', n=[50, 60]), "curve 'a' has no point of 50 + 60 images"),
])
def test_a_declaration_that_cannot_be_is_named(update, words):
    found = primary_problems([declared(**update)], dict(a=[(0, 50), (0, 200)], b=[(0, 50), (0, 200)]), ['test'])
    assert any(words in f and f.startswith('laws.primary.gap') for f in found), found

def test_declarations_are_part_of_params_yaml_and_at_most_eight():
    raw = load(ROOT/'params.yaml')
    p = dict(name='gap', kind='exponent', a='mnist', b='reference', test_set='test')
    raw['laws']['primary'] = [p]
    assert check_study(Study(ROOT, raw)).laws.primary[0].name == 'gap'
    raw['laws']['primary'] = [p | dict(b='referenc')]
    with pytest.raises(StudyError, match="laws.primary.gap is about 'referenc': no such curve.*did you mean"):
        check_study(Study(ROOT, raw))
    with pytest.raises(StudyError, match='at most 8'):
        validated(LawsSection, dict(primary=[p | dict(name=f'p{i}') for i in range(9)]), 'laws', 'params.yaml')

# ---- groups of classes

def test_groups_of_classes_need_their_whole_interval():
    rows = [{'class': c, 'n': n, 'seed': s, 'n_test': 1000, 'value': v+.002*s}
            for c, vs in dict(easy=(.9, .95), scaling=(.3, .9), poor=(.2, .22), edge=(.5, .61)).items()
            for n, v in zip((50, 800), vs) for s in range(3)]
    many = class_groups(pd.DataFrame(rows))
    assert many.group.tolist() == ['easy', 'scaling', 'poor', 'undecided']
    few = class_groups(pd.DataFrame(rows).assign(n_test=15)).set_index('class').group
    assert few['edge'] == few['poor'] == 'undecided' and set(few) <= {'easy', 'scaling', 'undecided'}
