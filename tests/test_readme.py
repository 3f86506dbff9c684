"Every number of the README's results follows from the committed points: worked out again here, by numpy alone."
import json, re
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

TEXT = (ROOT/'README.md').read_text()
CURVES = {'handwritten': 'mnist', 'generated, CLIP templates, guidance 1': 'reference',
          "rendered: the generators' corpus": 'rendered', '50 handwritten (half of each batch) + generated': 'fifty',
          '50 handwritten + generated, by count': 'by_count'}
METRIC = json.loads((ROOT/'results'/'headline.json').read_text())['metric']

@pytest.fixture(scope='module')
def points():
    return pd.read_csv(ROOT/'results'/'curves.csv')

def at_largest(points, curve, test, metric):
    g = points[(points.curve == curve) & (points.test_set == test) & (points.metric == metric)]
    return g.n_images.max(), g[g.n_images == g.n_images.max()].value.mean()

def exponents(points, curve, test, sizes=None):
    "The slope of each seed, by numpy."
    g = points[(points.curve == curve) & (points.test_set == test) & (points.metric == METRIC)]
    g = g[g.n_images.isin(sizes)] if sizes is not None else g
    return {s: -np.polyfit(np.log(d.n_images), np.log(d.value), 1)[0] for s, d in g.groupby('seed')}

def rows():
    lines = [[c.strip() for c in line.strip('|').split('|')] for line in TEXT.splitlines() if line.startswith('|')]
    return {r[0]: r[1:] for r in lines if r[0] in CURVES}

def test_the_table_has_every_row():
    assert list(rows()) == list(CURVES)

@pytest.mark.parametrize('words', CURVES)
def test_a_row_of_the_table(points, words):
    n, same, k, other = rows()[words]
    for cell, test in ((same, 'test'), (other, 'ood')):
        loss, top1 = (at_largest(points, CURVES[words], test, m)[1] for m in (METRIC, 'top1'))
        assert cell == f'{loss:.2f} / {100*top1:.1f} %'
    assert n == f"{at_largest(points, CURVES[words], 'test', METRIC)[0]:,}"
    if k:
        mean = np.mean(list(exponents(points, CURVES[words], 'test').values()))
        low, high = map(float, re.search(r'\[(.*), (.*)\]', k).groups())
        assert k.startswith(f'{mean:.2f} ') and low < mean < high

def test_the_difference_of_the_exponents(points):
    pattern = r'From ([\d,]+) to ([\d,]+) images the exponents k differ by ([\d.]+) \[([-\d.]+), ([-\d.]+)\]'
    low, high, found, lo, hi = (
        float(v.replace(',', '')) for v in re.search(pattern, ' '.join(TEXT.split())).groups())
    shared = [n for n in points[points.curve == 'reference'].n_images.unique()
              if low <= n <= high and n in set(points[points.curve == 'mnist'].n_images)]
    a, b = (exponents(points, c, 'test', shared) for c in ('mnist', 'reference'))
    difference = np.mean([a[s]-b[s] for s in a])
    assert (min(shared), max(shared)) == (low, high)
    assert abs(difference-found) <= .0051 and lo < found < hi

def test_how_many_handwritten_digits_the_generated_ones_are_worth(points):
    pattern = r'([\d,]+) generated digits train a classifier as well as (fewer than )?(\d+) to (\d+)'
    n, fewer, least, most = re.search(pattern, ' '.join(TEXT.split())).groups()
    assert n == f"{at_largest(points, 'reference', 'test', METRIC)[0]:,}"
    of = points[(points.metric == METRIC) & (points.test_set == 'test')]
    made = of[of.curve == 'reference'].sort_values('n_images').groupby('seed').value.last()
    worth = []
    for seed, g in of[of.curve == 'mnist'].groupby('seed'):
        g = g.sort_values('n_images')
        level = np.minimum.accumulate(g.value.to_numpy())              # more images never count as worse
        worth.append(np.exp(np.interp(-np.log(made[seed]), -np.log(level), np.log(g.n_images))))
    smallest = of[of.curve == 'mnist'].n_images.min()
    assert bool(fewer) == (min(worth) <= smallest*1.0001)
    assert abs(min(worth)-int(least)) <= .51 and abs(max(worth)-int(most)) <= .51
