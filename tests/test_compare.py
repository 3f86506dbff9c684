"Two results agree, or the table, the row and the number are named."
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from conftest import ROOT, sh
from synthscale.compare import TOLERANCE, compare, result_tables
from synthscale.run import main
from synthscale.study import StudyError

def put(folder, t, name='laws'):
    folder.mkdir(exist_ok=True)
    t.to_csv(folder/f'{name}.csv', index=False)
    return folder

@given(st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=1, max_size=6), st.floats(1e-12, 1), st.data())
@settings(deadline=None, max_examples=40)
def test_a_difference_is_seen_if_it_is_beyond_the_tolerance(tmp_path_factory, values, by, data):
    d, i = tmp_path_factory.mktemp('c'), data.draw(st.integers(0, len(values)-1))
    a = pd.DataFrame(dict(curve=[f'c{k}' for k in range(len(values))], value=values))
    b = a.copy()
    b.loc[i, 'value'] *= 1+by
    row = compare(put(d/'a', a), put(d/'b', b.sample(frac=1, random_state=0))).iloc[0]
    x, y = a.value[i], b.value[i]
    true = abs(x-y)/max(abs(x), abs(y)) if x != y else 0
    assert row.largest == pytest.approx(true, rel=1e-6, abs=1e-15) and row.only_a == row.only_b == 0
    assert row.verdict == ('equal' if true == 0 else 'agree' if row.largest <= TOLERANCE else 'differ')
    assert not true or row['row'] == f'c{i}'

OTHER = {'a row more': lambda t: pd.concat([t, t[:1].assign(seed=9)]), 'a row less': lambda t: t[1:],
         'a row twice': lambda t: pd.concat([t, t[:1]]), 'a column less': lambda t: t.drop(columns='note'),
         'another text': lambda t: t.assign(note='z'), 'a hole': lambda t: t.assign(value=[np.nan, *t.value[1:]]),
         'infinite': lambda t: t.assign(value=[np.inf, *t.value[1:]]),
         'another sign': lambda t: t.assign(value=-t.value)}

@pytest.mark.parametrize('how', OTHER)
def test_whatever_is_not_a_small_number_differs(tmp_path, how):
    t = pd.DataFrame(dict(curve='a', seed=[0, 1], value=[.5, .25], note='x'))
    a, b = put(tmp_path/'a', t), put(tmp_path/'b', OTHER[how](t))
    assert compare(a, b).verdict.tolist() == compare(b, a).verdict.tolist() == ['differ']
    assert compare(b, b).verdict.tolist() == ['equal']

def test_the_committed_results_agree_with_themselves_and_with_their_commit(capsys):
    assert main(['compare', str(ROOT), str(ROOT/'results')]) == 0
    assert 'all agree' in capsys.readouterr().out
    head = {n: d for n, d in result_tables('HEAD', ROOT).items()}
    assert set(head) == set(result_tables(ROOT)) and 'costs' not in head

def test_a_changed_number_is_named_on_the_command_line(tmp_path, capsys):
    t = pd.read_csv(ROOT/'results'/'laws.csv')
    row = t.index[(t.curve == 'mnist') & (t.test_set == 'ood') & t.metric.isin(['top1', 'error'])][0]
    put(tmp_path/'b', t.assign(k=t.k.where(t.index != row, t.k*1.01)))
    put(tmp_path/'a', t)
    assert main(['compare', str(tmp_path/'a'), str(tmp_path/'b')]) == 1
    said = capsys.readouterr().out
    assert f'mnist ood {t.metric[row]}' in said and '1 tables, 1 of them differ' in said

@pytest.mark.parametrize('where', ['nowhere', 'HEAD~99999', '--help', 'x y'])
def test_no_results_are_an_error(where, tmp_path):
    sh('git init -q', tmp_path)
    with pytest.raises(StudyError, match='no folder with results'):
        result_tables(where, tmp_path)

def test_a_table_that_got_a_key_is_compared_by_the_others(tmp_path):
    t = pd.DataFrame(dict(curve=['a', 'b'], test_set='test', move=[.1, .2]))
    for name, table in (('old', t), ('new', t.assign(metric='loss'))):
        (tmp_path/name).mkdir()
        table.to_csv(tmp_path/name/'compute_check.csv', index=False)
    found = compare(tmp_path/'old', tmp_path/'new').iloc[0]
    assert (found.rows, found.largest, found.verdict) == (2, 0, 'differ')
