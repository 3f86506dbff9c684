"""How often an interval of a ratio of losses leaves 1 where the truth is 1. Prints one JSON line.

    python benchmarks/intervals.py [--studies 1000]

A study is simulated: six runs of two arms on the same test images, whose losses are lognormal with a spread; each image
reacts to the arm by a factor of its own, of which the mean logarithm is 0. Fieller's interval, that of `your_task`, is
compared with that of the logarithm of the ratio (delta method) on the same losses.
"""
import argparse, json, time
from importlib.metadata import version
import numpy as np
from synthscale.components import contrast, effect
from synthscale.decision import loss_gain
from synthscale.recipes import pack_values

def arms(rng, n, spread, react, runs=6):
    "Losses of two arms, runs x images."
    image, moved = rng.lognormal(-1, spread, n), react*rng.normal(size=n)
    return [np.array([image*np.exp(way*moved/2+.03*rng.normal()+.2*rng.normal(size=n)) for _ in range(runs)])
            for way in (1, -1)]

def records(losses):
    "Runs as `loss_gain` reads them."
    return {s: dict(tests=dict(test=dict(n_test=len(v), each=dict(loss_calibrated=pack_values(v)))))
            for s, v in enumerate(losses)}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--studies', type=int, default=1000, help='of each kind (default: %(default)s)')
    a, began, rows = p.parse_args(), time.time(), []
    for spread, react in ((1., .3), (1.5, .5), (2., .5), (2.5, .5)):
        for n in (20, 60, 200):
            rng, wrong = np.random.default_rng(0), np.zeros((2, 2), int)
            for _ in range(a.studies):
                A, B = arms(rng, n, spread, react)
                g = loss_gain(records(A), records(B), 'test')
                e = effect([contrast(np.stack([A, B], 1), [1., -1.])])
                wrong += [[g['ci_hi'] < 1, g['ci_lo'] > 1], [e['ci_hi'] < 0, e['ci_lo'] > 0]]
            rows.append(dict(spread=spread, react=react, n_test=n, fieller=(wrong[0]/a.studies).tolist(),
                             delta=(wrong[1]/a.studies).tolist()))
    print(json.dumps(dict(benchmark='intervals', studies=a.studies, runs=6, allowed=.025, shares=['below 1', 'above 1'],
                          rows=rows, worst={k: max(max(r[k]) for r in rows) for k in ('fieller', 'delta')},
                          wall_seconds=round(time.time()-began, 1),
                          versions={k: version(k) for k in ('numpy', 'scipy')})))

if __name__ == '__main__':
    main()
