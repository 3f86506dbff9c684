"""Tables that somebody else made: what is odd about one is an error that names it, or a sentence that says how it was
read; nothing is dropped without a row in not_used.csv."""
import shutil
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from conftest import ROOT
from synthscale.laws import fit_own, fit_study, study_curves, with_n
from synthscale.own import kind_of, own_pairs, own_table
from synthscale.results import check_complete, read_curves
from synthscale.run import main
from synthscale.study import Study, StudyError

HEAD = 'curve,n_images,value\n'
GOOD = HEAD+'a,100,.5\na,200,.4\na,400,.3\n'
ODD = {                                                              # the file, what the message names
    'empty': (b'', 'the file is empty'),
    'header only': (HEAD, 'only a header'),
    'null bytes': (GOOD.replace('.4', '.\x004'), 'null bytes'),
    'latin-1': (GOOD.encode()+'k\xe4se,1,2\n'.encode('latin-1'), 'row 5 is not UTF-8'),
    'a ragged row': (GOOD+'a,800\n', 'row 5 has 2 fields'),
    'a row too long': (GOOD+'a,800,.2,x\n', 'row 5 has 4 fields'),
    'a column twice': (GOOD.replace('value', 'value,value', 1), "column 'value' occurs twice"),
    'another name': (GOOD.replace('n_images', 'n_image'), "column 'n_images' is missing.*did you mean 'n_image'"),
    'a word': (GOOD.replace('.4', 'nix'), "row 3: value is 'nix'"),
    'a hole': (GOOD.replace('.4', ''), 'row 3: value is nan'),
    'infinity': (GOOD.replace('.4', 'inf'), 'row 3: value is inf'),
    'a loss of zero': (GOOD.replace('.4', '0'), 'row 3: loss is 0'),
    'no size': (GOOD.replace('200', '0'), 'row 3: n_images is 0'),
    'half an image': (GOOD.replace('200', '200.5'), 'row 3: n_images is 200.5'),
    'a key with a hole': (GOOD.replace('a,200', ',200'), 'row 3: curve is'),
    'blanks around a name': (GOOD.replace('a,200', '" a",200'), "row 3: curve is ' a'"),
    'the same row again': (GOOD+'a,400,.2\n', 'row 5 repeats the keys'),
    'a dash in the seeds': ('curve,n_images,value,seed\na,100,.5,0\na,200,.4,\n', 'row 3: seed is'),
    'no bytes of parquet': (b'', 'not readable as parquet'),
}

def write(tmp_path, content, name='my.csv'):
    (tmp_path/name).write_bytes(content.encode() if isinstance(content, str) else content)
    return tmp_path/name

@pytest.mark.parametrize('odd', ODD)
def test_an_odd_file_is_an_error_that_names_it(odd, tmp_path):
    content, words = ODD[odd]
    path = write(tmp_path, content, 'my.parquet' if 'parquet' in odd else 'my.csv')
    with pytest.raises(StudyError, match=words) as e:
        own_table(path)
    assert path.name in str(e.value)

READ = {                                                             # the same three losses, written in other ways
    'semicolons': 'curve;n_images;value\na;100;0,5\na;200;0,4\na;400;0,3\n',
    'tabs': GOOD.replace(',', '\t'),
    'a byte order mark': '\ufeff'+GOOD,
    'Windows lines': GOOD.replace('\n', '\r\n'),
    'empty lines': GOOD.replace('a,200', '\n\na,200'),
    'a name that is a number': GOOD.replace('a,', '007,'),
    'a name that is NA': GOOD.replace('a,', 'NA,'),
    'accuracies': 'curve,n_images,value,metric\na,100,.5,acc\na,200,.6,acc\na,400,.7,acc\n',
    'percentages': HEAD+'a,100,50\na,200,60\na,400,70\n',
    'signs': HEAD+'a,100,50 %\na,200,60 %\na,400,70 %\n',
    'error percentages': 'curve,n_images,value,metric\na,100,50,err\na,200,40,err\na,400,30,err\n',
    'a column of its own': 'curve,n_images,accuracy\na,100,.5\na,200,.6\na,400,.7\n',
}

@pytest.mark.parametrize('way', READ)
def test_a_table_is_read_in_whatever_way_it_is_written(way, tmp_path):
    t = own_table(write(tmp_path, READ[way]), 'accuracy' if 'own' in way else '')
    assert np.allclose(t.df.value, [.5, .4, .3], rtol=0, atol=1e-12) and not len(t.unused)
    assert t.df.curve.unique().tolist() == ['NA' if 'NA' in way else '007' if 'number' in way else 'a']
    assert bool(t.notes) == (way in ('accuracies', 'percentages', 'signs', 'error percentages', 'a column of its own'))

KINDS = {'loss': 'loss', 'Loss/val': 'loss', 'cross_entropy': '', 'eval_loss': 'loss', 'top1': 'accuracy',
         'Top-1': 'accuracy', 'top_5_acc': 'accuracy', 'acc@5': 'accuracy', 'mean recall': 'accuracy',
         'val/accuracy': 'accuracy', 'mAP': 'accuracy', 'top1_err': 'error', 'error': 'error', 'Error %': 'error',
         'word error rate': 'error', 'seconds': ''}

def test_names_of_metrics():
    assert {m: kind_of(m) for m in KINDS} == KINDS

@given(st.lists(st.floats(.01, .99), min_size=2, max_size=6), st.booleans(), st.sampled_from(['accuracy', 'error']))
@settings(deadline=None, max_examples=50)
def test_percentages_are_a_hundred_times_a_share(tmp_path_factory, shares, percent, kind):
    d, v = tmp_path_factory.mktemp('t'), np.array(shares)
    if percent and (v*100).max() <= 1: return
    t = pd.DataFrame(dict(curve='a', n_images=100*2**np.arange(len(v)), value=v*(100 if percent else 1), metric=kind))
    t.to_csv(d/'my.csv', index=False)
    t = own_table(d/'my.csv')
    assert np.allclose(t.df.value, 1-v if kind == 'accuracy' else v, rtol=1e-9, atol=1e-12)
    assert any('percentages' in n for n in t.notes) == percent

@pytest.mark.parametrize('values, words', [
    ([.5, .6, 1.], 'row 4: no error at all'), ([50, 60, 101], 'row 4: acc is 101'),
    ([-.1, .6, .7], 'row 2: acc is -0.1')])
def test_shares_that_are_none(values, words, tmp_path):
    pd.DataFrame(dict(curve='a', n_images=[1, 2, 4], value=values, metric='acc')).to_csv(tmp_path/'my.csv', index=False)
    with pytest.raises(StudyError, match=words):
        own_table(tmp_path/'my.csv')

def test_every_row_is_used_or_named(tmp_path, capsys):
    n = 100*2**np.arange(4)
    a, b = (pd.DataFrame(dict(curve=c, n_images=n, value=3*n**-k, metric='loss')) for c, k in (('a', .3), ('b', .2)))
    t = pd.concat([a, b, a.assign(metric='acc', value=.5), b[:1].assign(curve='alone')])
    t.assign(lr=.1).to_csv(tmp_path/'my.csv', index=False)
    laws = fit_own(tmp_path/'my.csv', tmp_path/'out')
    said, unused = capsys.readouterr().out, pd.read_csv(tmp_path/'out'/'not_used.csv')
    assert laws.curve.tolist() == ['a', 'b'] and unused.row.tolist() == [10, 11, 12, 13, 14]
    assert len(unused)+len(own_table(tmp_path/'my.csv').df) == len(t)
    assert '5 rows are not used' in said and 'columns that are not used: lr' in said
    fit_own(tmp_path/'my.csv', tmp_path/'out', metric='acc', kind='loss')          # another choice, other rows
    assert (pd.read_csv(tmp_path/'out'/'not_used.csv').metric == 'loss').all()
    pd.concat([a, b]).to_csv(tmp_path/'my.csv', index=False)
    fit_own(tmp_path/'my.csv', tmp_path/'out')
    assert not (tmp_path/'out'/'not_used.csv').exists()

def test_metrics_are_listed_and_chosen_on_the_command_line(tmp_path, capsys):
    n = 100*2**np.arange(4)
    pd.concat([pd.DataFrame(dict(curve=c, n_images=n, value=1-3*n**-k, metric=m))
               for c, k in (('a', .5), ('b', .4)) for m in ('top1', 'top5')]).to_csv(tmp_path/'my.csv', index=False)
    given = ['laws', '-p', 'curves', str(tmp_path/'my.csv'), '-p', 'out', str(tmp_path/'out')]
    assert main(given) == 1 and "2 metrics, 'top1', 'top5'; choose one" in capsys.readouterr().err
    assert main([*given, '-p', 'metric', 'top5', '-p', 'reference', 'b', '-p', 'budget', '300']) == 0
    laws, pairs, runs = (pd.read_csv(tmp_path/'out'/f'{t}.csv') for t in ('laws', 'comparisons', 'next_runs'))
    assert laws.k.round(6).tolist() == [.5, .4] and set(laws.metric) == {'top5'}
    assert pairs[['a', 'b']].values.tolist() == [['b', 'a']] and (runs.cost <= 300).all() and len(runs) == 2

def test_compared_is_what_is_declared_or_every_curve_with_one(tmp_path):
    df = pd.DataFrame(dict(curve=[f'c{i}' for i in range(40)]))
    assert len(own_pairs(df)) == 39 and own_pairs(df, 'c3')[0] == ('c3', 'c0')
    file = write(tmp_path, 'a,b\nc0,c1\nc5,c2\n', 'pairs.csv')
    assert own_pairs(df, compare=str(file)) == [('c0', 'c1'), ('c5', 'c2')]
    for words, how in (("row 2: no curve 'x'", dict(compare=str(write(tmp_path, 'a,b\nx,c1\n', 'x.csv')))),
                       ("column 'b' is missing", dict(compare=str(write(tmp_path, 'a,c\nc0,c1\n', 'y.csv')))),
                       ('expected one of them', dict(reference='c0', compare=str(file))),
                       ('not readable', dict(compare=str(tmp_path/'none.csv')))):
        with pytest.raises(StudyError, match=words):
            own_pairs(df, **how)

def test_values_too_small_for_doubles_have_no_forecast(tmp_path):
    pd.DataFrame(dict(curve='a', n_images=[1, 2, 4], value=[1, .1, 1e-300])).to_csv(tmp_path/'my.csv', index=False)
    fit_own(tmp_path/'my.csv', tmp_path)
    assert 'too small' in set(pd.read_csv(tmp_path/'diagnostics.csv').code)
    assert not len(pd.read_csv(tmp_path/'forecasts.csv'))

def test_a_budget_is_kept_and_what_costs_less_for_nearly_as_much_is_advised(tmp_path):
    n = 100*2**np.arange(6)
    rng = np.random.default_rng(0)
    df = pd.concat([pd.DataFrame(dict(curve='a', test_set='test', n_images=n, seed=s,
                                      value=3*n**-.3*np.exp(rng.normal(0, .03, 6)))) for s in range(3)])
    first = {}
    for budget in (200, 3200, 10**5):
        t = study_curves(with_n(df), ['a'], budget=budget)['a', 'test'].next
        assert (t.cost <= budget).all() and t.saved[0] >= .9*t.saved.max()
        first[budget] = t.saved[0]
    assert sorted(first.values()) == list(first.values())

def test_a_study_is_not_fitted_from_an_incomplete_table(tmp_path):
    for f in ('params.yaml', 'results/curves.csv'):
        (tmp_path/f).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT/f, tmp_path/f)
    s, t = Study(tmp_path), read_curves(ROOT/'results/curves.csv')
    cut = {'a row': t.drop(index=5), 'the last half': t[:len(t)//2], 'a metric': t[t.metric != 'top1'],
           'a test set': t[t.test_set != t.test_set.iloc[-1]], 'a seed': t[t.seed != t.seed.max()]}
    for rows in cut.values():
        rows.to_csv(tmp_path/'results/curves.csv', index=False)
        with pytest.raises(StudyError, match='rows are missing'):
            fit_study(s)
    assert len(check_complete(s, t)) == len(t)
