"""The page that is sent to others: one file that asks no network for anything, whose numbers are the cells of the
tables that it names, and which can be read on a telephone, in the dark, by keyboard and without a script."""
import base64, copy, csv, hashlib, html, json, math, os, re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from browser import NAMES, Browser, chromium
from conftest import ROOT, sh
from synthscale.page import SCRIPT, STYLE, page, picture, policy, shown, study_content, write_own_page, write_page
from synthscale.study import Study, StudyError, write_atomic

STUDIES = ['.', *(f'studies/{n}' for n in ('cifar10', 'flickr8k', 'pilot'))]
VOID = {'meta', 'img', 'br', 'link', 'input', 'path', 'base', 'source', 'hr'}
DECISION = {
    'name': 'digits', 'verdict': 'generate', 'why': 'Both tests gain.', 'recipe': 'convnext_digits',
    'photos': {'set': 'mnist', 'n': 50, 'n_test': 1200},
    'source': {'set': 'reference', 'label': 'drawn', 'model': 'mini_sd', 'prompts': 'templates', 'guidance_scale': 1.5,
               'share': .5, 'n_synthetic': 3200},
    'gain': {'test_set': 'test', 'metric': 'loss', 'ratio': .834, 'ci_lo': .73, 'ci_hi': .95, 'top1': .021,
             'top1_lo': .004, 'top1_hi': .04, 'n_seeds': 5},
    'photos_for_same_gain': {'n': 70, 'ci_lo': 60, 'ci_hi': 90, 'words': None},
    'next': [{'what': 'twice as many photographs', 'n': 100, 'ratio': .63, 'ci_lo': .5, 'ci_hi': .8}],
    'classes': [{'class': 'three', 'ratio': .8, 'ci_lo': .7, 'ci_hi': .9, 'change': .05, 'words': 'gains'},
                {'class': 'four', 'ratio': 1., 'ci_lo': .9, 'ci_hi': 1.1, 'change': 0., 'words': 'no change shown'}],
    'controls': [{'control': 'the photographs alone', 'loss': .6, 'ratio': .834, 'ci_lo': .73, 'ci_hi': .95}],
    'anchors': [{'recipe': 'convnext_digits', 'arch': 'convnext_atto', 'n_seeds': 3, 'validation_loss': .5, 'loss': .61,
                 'top1': .8}],
    'curve': [{'n_photos': 50, 'n_seeds': 3, 'loss': .62, 'top1': .79}],
    'forecast': [{'n_photos': 150, 'loss': .4, 'ci_lo': .3, 'ci_hi': .5}],
    'drawn': [{'class': 'five', 'recognized': .21, 'recall': .93, 'words': 'hardly recognised in the images'}],
    'left_out': ['recipe slow: with it, the rest would not fit into the time'],
    'near_copies': {'n': 0, 'of': 3200}, 'hours': .4, 'would_change': 'Fifty more photographs.',
    'commands': ['synthscale generate-shards reference', 'dvc repro --with-an-option-that-is-as-long-as-one-can-be']}

class Tree(HTMLParser):
    "All elements of a page: name, attributes, text inside, names of the elements around."
    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        e = dict(tag=tag, at=dict(attrs), text='', around=[o['tag'] for o in self.open], up=list(self.open))
        self.found.append(e)
        if tag not in VOID:
            self.open.append(e)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1]['tag'] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1]['tag'] == tag, f'</{tag}> closes {self.open[-1:]}'
        self.open.pop()

    def handle_data(self, data):
        for e in self.open:
            e['text'] += data

    def all(self, *tags):
        "The elements of some names."
        return [e for e in self.found if e['tag'] in tags]

def content(name='.', raw=None):
    "What the page of a study of this repository shows."
    return study_content(Study(ROOT/name, raw))

@pytest.fixture(scope='module')
def pages():
    return {name: page(content(name)) for name in STUDIES}

def sample(path, seed):
    "A picture of ten grey images of ten classes, as the data stage makes it."
    path.parent.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (80, 80), dtype=np.uint8)).save(path)

@pytest.fixture(scope='module')
def full(tmp_path_factory):
    "The embedded study with every part that a page can have, and its page."
    d = tmp_path_factory.mktemp('full')
    shutil.copy(ROOT/'params.yaml', d)
    shutil.copytree(ROOT/'results', d/'results', ignore=shutil.ignore_patterns('*.parquet'))
    (d/'results'/'decision.json').write_text(json.dumps(DECISION))
    (d/'audit.csv').write_text('set,class,train,test,damaged\nmnist,zero,320,120,\nmnist,all,3200,1200,2\n')
    for i, name in enumerate(Study(d).report.samples):
        sample(d/'runs'/'data'/name/'samples.png', i)
    strip = picture(np.random.default_rng(9).integers(0, 255, (8, 80), dtype=np.uint8), 4)
    shots = [{'class': c, 'words': '', 'photos': strip, 'added': strip} for c in ('three', 'five')]
    write_atomic(d/'runs'/'your_task'/'decision'/'pictures.json', json.dumps(shots))
    write_page(Study(d))
    return d

def read(full):
    return (full/'figures'/'page.html').read_text()

# ---- nothing is fetched

LINKS = ('src', 'href', 'srcset', 'action', 'formaction', 'data', 'poster', 'xlink:href', 'background', 'ping')

def fetched(text):
    "What a browser would ask for, or do, because of a page: names of what is wrong."
    tree, found = Tree(text), []
    for e in tree.found:
        found += [f"{e['tag']} {k}" for k in LINKS if not (e['at'].get(k) or '#').startswith(('#', 'data:image/'))]
        found += [f"{e['tag']} {k}" for k in e['at'] if k.startswith('on') or k == 'style']
        if e['tag'] in ('link', 'iframe', 'object', 'embed', 'base', 'form', 'video', 'audio'):
            found.append(e['tag'])
    styles = ''.join(e['text'] for e in tree.all('style'))
    found += re.findall(r'@import|url\((?!data:)|expression\(', styles)
    scripts = ''.join(e['text'] for e in tree.all('script'))
    found += re.findall(r'fetch\(|XMLHttpRequest|WebSocket|import\(|sendBeacon|https?:|eval\(|innerHTML', scripts)
    return found

@pytest.mark.parametrize('name', STUDIES)
def test_a_page_asks_for_nothing_and_is_small(pages, name):
    assert fetched(pages[name]) == []
    assert len(pages[name].encode()) < 3e6

def test_so_does_one_with_every_part(full):
    assert fetched(read(full)) == [] and len(read(full).encode()) < 3e6

@pytest.mark.parametrize('bad', [
    '<img src="http://example.org/a.png">', '<link rel="stylesheet" href="a.css">', '<p style="color:red">a</p>',
    '<style>@import "a.css";</style>', '<style>p{background:url(a.png)}</style>', '<script>fetch("a")</script>',
    '<p onclick="a()">b</p>', '<script src="a.js"></script>', '<a href="https://example.org">a</a>'])
def test_what_is_fetched_would_be_found(bad):
    assert fetched(f'<!DOCTYPE html><html><body>{bad}</body></html>')

def test_the_policy_allows_what_the_page_has_and_nothing_else(full):
    tree = Tree(read(full))
    [meta] = [e['at']['content'] for e in tree.all('meta') if e['at'].get('http-equiv') == 'Content-Security-Policy']
    assert meta == policy() and "default-src 'none'" in meta and 'unsafe' not in meta and 'http' not in meta
    for kind, text in (('style', STYLE), ('script', SCRIPT)):
        [element] = tree.all(kind)
        assert element['text'] == text
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in meta

# ---- the same bytes, whatever is in it

def test_the_same_study_gives_the_same_bytes(pages):
    code = "import sys; from synthscale.page import *; from synthscale.study import Study; "
    code += f"sys.stdout.write(page(study_content(Study({str(ROOT)!r}))))"
    other = subprocess.run([sys.executable, '-c', code], cwd='/', capture_output=True, check=True,
                           env={**os.environ, 'PYTHONHASHSEED': '7', 'PYTHONPATH': str(ROOT), 'TZ': 'Asia/Tokyo'})
    assert hashlib.sha256(other.stdout).hexdigest() == hashlib.sha256(pages['.'].encode()).hexdigest()

BAD = '<script>alert("1")</script>&amp;\''

def test_names_are_no_html():
    raw = copy.deepcopy(Study(ROOT).raw)
    raw['report']['labels'] |= {'mnist': BAD, 'test': BAD, 'fifty': BAD}
    raw['generate']['sources']['reference']['label'] = BAD
    raw['laws']['primary'][0]['claim'] = BAD
    text = page(content(raw=raw))
    tree = Tree(text)
    assert text.count('<script>') == 1 and len(tree.all('script')) == 1 and fetched(text) == []
    assert sum(BAD in e['text'] for e in tree.all('th')) > 10                # it is there, as text
    assert any(BAD in e['text'] for e in tree.all('h3')) and any(BAD in e['text'] for e in tree.all('title'))

def test_names_of_a_table_and_of_a_decision_are_no_html(tmp_path):
    with open(tmp_path/'my.csv', 'w', newline='') as f:
        csv.writer(f).writerows([['curve', 'n_images', 'value', 'test_set'],
                                 *([c, n, n**-.3, BAD] for c in (BAD, '"><img src=x onerror=a()>') for n in (10, 99))])
    text = write_own_page(tmp_path/'my.csv', tmp_path/'out').read_text()
    assert fetched(text) == [] and not Tree(text).all('img') and any(BAD in e['text'] for e in Tree(text).all('th'))
    shutil.copytree(ROOT/'results', tmp_path/'results', ignore=shutil.ignore_patterns('*.parquet'))
    def spoiled(v):
        if isinstance(v, dict): return {k: spoiled(w) for k, w in v.items()}
        return [spoiled(w) for w in v] if isinstance(v, list) else BAD if isinstance(v, str) else v
    (tmp_path/'results'/'decision.json').write_text(json.dumps(spoiled(DECISION)))
    text = page(study_content(Study(tmp_path, Study(ROOT).raw)))
    assert fetched(text) == [] and len(Tree(text).all('script')) == 1

# ---- what is missing is left out

def parts(text):
    "The ids of the parts of a page."
    return [e['at']['id'] for e in Tree(text).all('h2') if 'id' in e['at']]

EVERY = ['behind', 'found', 'curves', 'exchange', 'added', 'claims', 'all', 'images', 'audit', 'limits', 'sources']
GONE = {'exchange': ['exchange'], 'added_data': ['added'], 'laws': [], 'forecasts': [], 'comparisons': [],
        'primary': [], 'clip_primary': [], 'clip_gaps': [], 'diagnostics': [],
        'summary': ['curves', 'all']}

def test_every_part_is_there(full):
    assert parts(read(full)) == EVERY

@pytest.mark.parametrize('table', GONE)
def test_a_missing_table_leaves_its_part_out(full, tmp_path, table):
    shutil.copytree(full, tmp_path/'d')
    (tmp_path/'d'/'results'/f'{table}.csv').unlink()
    text = page(study_content(Study(tmp_path/'d')))
    assert parts(text) == [p for p in EVERY if p not in GONE[table]]
    assert f'"{table}.csv:' not in text and f'results/{table}.csv' not in text or table == 'summary'

def test_a_study_without_any_table_has_a_page(tmp_path):
    shutil.copy(ROOT/'params.yaml', tmp_path)
    text = page(study_content(Study(tmp_path)))
    assert parts(text) == ['sources'] and 'Nothing is compared yet' in text

@pytest.mark.parametrize('key', [*DECISION, *(f'{k}.{i}' for k in ('source', 'gain', 'photos') for i in DECISION[k])])
@pytest.mark.parametrize('null', [True, False])
def test_any_key_of_the_decision_may_be_missing(full, tmp_path, key, null):
    found = copy.deepcopy(DECISION)
    *outer, last = key.split('.')
    inner = found[outer[0]] if outer else found
    inner[last] = None
    if not null:
        del inner[last]
    (tmp_path/'decision.json').write_text(json.dumps(found))
    c = study_content(Study(full))
    c.book.folder = tmp_path
    text = page(c)
    assert 'None' not in text and 'nan' not in re.sub('<[^>]*>', ' ', text).split() and fetched(text) == []

def test_a_decision_that_is_no_decision_names_its_file(full, tmp_path):
    c = study_content(Study(full))
    c.book.folder = tmp_path
    for text in ('{', '3'):
        (tmp_path/'decision.json').write_text(text)
        with pytest.raises(StudyError, match='decision.json'):
            page(c)

def test_the_decision_is_what_is_seen_first(full):
    text = html.unescape(re.sub('<[^>]*>', '', read(full).split('</section>')[0].split('<h1>')[1]))
    said = ['Generate.', 'Both tests gain.', 'the loss times 0.83 [0.73, 0.95], top-1 +2.1 [+0.4, +4.0] points',
            "on MNIST's handwriting, 5 seeds", '3,200 of drawn', 'guidance 1.5', '50 to train on', '70 [60, 90]',
            'twice as many photographs, 100, the loss times 0.63 [0.50, 0.80]', '0 of 3,200', 'Fifty more photographs.',
            *DECISION['commands']]
    assert [s for s in said if s not in text] == []

def test_each_question_has_its_verdict(full, tmp_path):
    "The first on the first screen, the others below."
    shutil.copytree(full/'results', tmp_path/'results')
    for name, verdict in (('one', 'do not generate'), ('two', 'cannot tell')):
        said = DECISION | {'name': name, 'verdict': verdict}
        (tmp_path/'results'/f'{name}.json').write_text(json.dumps(said))
    text = page(study_content(Study(tmp_path, Study(ROOT).raw | {'your_task': {'one': {}, 'two': {}, 'three': {}}})))
    first, rest = text.split('</section>', 1)
    assert 'Do not generate.' in first and 'Cannot tell.' in rest and 'Generate.' not in text
    assert parts(text)[:4] == ['behind', 'found', 'questions', 'curves'] and fetched(text) == []
    accessible(text)

# ---- every number is a cell of the table that it names

def table_cells(folder):
    "(file, line) -> cells of all tables of a study."
    found = {}
    for path in [*(folder/'results').glob('*.csv'), *folder.glob('audit.csv')]:
        with open(path, newline='') as f:
            lines = csv.reader(f)
            head = next(lines)
            found |= {(path.name, lines.line_num): dict(zip(head, row)) for row in lines}
    return found

def check_sources(text, folder):
    "How many numbers of a page stand in the cell that they name, and which do not."
    cells, wrong, n = table_cells(folder), [], 0
    for e in Tree(text).found:
        if 'data-cell' not in e['at']: continue
        file, line, column = e['at']['data-cell'].split(':')
        if file.endswith('.json'): continue
        value = cells.get((file, int(line)), {}).get(column)
        n += 1
        if value is None or e['tag'] == 'data' and value != e['at']['value']:
            wrong.append((e['at'], value))
    return n, wrong

@pytest.mark.parametrize('name', STUDIES)
def test_numbers_are_the_cells_that_they_name(pages, name):
    n, wrong = check_sources(pages[name], ROOT/name)
    assert wrong == [] and n > 50

def test_numbers_are_the_cells_that_they_name_in_a_page_with_every_part(full):
    n, wrong = check_sources(read(full), full)
    assert wrong == [] and n > 2000
    changed = read(full).replace('summary.csv:9:mean', 'summary.csv:10:mean')
    assert check_sources(changed, full)[1]                                   # the check can fail

def test_the_text_of_a_number_is_the_number(full):
    "As it is, as a percentage or points, or as a number of images over a rate."
    rows, wrong = table_cells(full), []
    for e in Tree(read(full)).all('data'):
        text = e['text'].replace(',', '').removesuffix(' %')
        try:
            said, value = float(text), float(e['at']['value'])
        except ValueError:
            continue
        file, line, column = e['at']['data-cell'].split(':')
        of = float(rows.get((file, int(line)), {}).get('n_synthetic') or 'nan')
        near = [value, 100*value, of/value if value else 0]
        if not any(math.isclose(said, v, rel_tol=.06, abs_tol=.0051) or abs(said-v) <= .51 <= abs(said) for v in near):
            wrong.append(e['at'])
    assert wrong == []

@pytest.mark.parametrize('name', STUDIES)
def test_no_number_in_a_table_lacks_its_cell(pages, name):
    "What is left of the cells of a table without numbers that have a source, places, and words of the study."
    labels = sorted(map(html.escape, content(name).words.labels.values()), key=len, reverse=True)
    bare = []
    for table in re.findall(r'<table.*?</table>', pages[name], re.S):
        if 'SHA-256' in table: continue
        for cell in re.findall(r'<td[^>]*>(.*?)</td>', table, re.S):
            left = re.sub(r'<data .*?</data>|<small .*?</small>', '', cell)
            for words in labels:
                left = left.replace(words, '')
            bare += [cell] if re.search(r'\d', re.sub('<[^>]*>|&#x?[0-9a-f]+;', '', left)) else []
    assert bare == []

def test_every_point_of_a_chart_names_its_cell(full):
    points = [e for e in Tree(read(full)).all('g') if e['at'].get('class') == 'point']
    assert len(points) > 200 and all(re.fullmatch(r'[a-z_]+\.csv:\d+:\w+', p['at']['data-cell']) for p in points)

def test_the_table_of_all_curves_has_the_numbers_of_the_tables(pages):
    "Worked out again by the csv module alone."
    c = content()
    with open(ROOT/'results'/'summary.csv', newline='') as f:
        points = [r for r in csv.DictReader(f) if r['test_set'] in c.tests]
    with open(ROOT/'results'/'laws.csv', newline='') as f:
        laws = {(r['curve'], r['test_set']): r for r in csv.DictReader(f) if r['metric'] == c.metric}
    [table] = re.findall(r'<table class="sortable">.*?</table>', pages['.'], re.S)
    lines = re.findall(r'<tr>(.*?)</tr>', table, re.S)[1:]
    lines = [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', line, re.S) for line in lines]
    texts = [[html.unescape(re.sub('<[^>]*>', '', v)) for v in line] for line in lines]
    every = {(r['curve'], r['test_set']) for r in points if r['metric'] == c.metric}
    assert len(texts) == len(every) > 100
    for curve, test in every:
        own = [r for r in points if (r['curve'], r['test_set']) == (curve, test)]
        most = max(own, key=lambda r: (r['metric'] == c.metric, int(r['n_images']), int(r['n_real'])))
        same = {r['metric']: r for r in own if all(r[v] == most[v] for v in ('n_images', 'n_real', 'n_synthetic'))}
        said = [c.look(curve)[2], c.words(test), f"{int(most['n_images']):,}"]
        if curve in c.x: continue                                    # its size is that of its captions
        [line] = [t for t in texts if t[:3] == said]
        assert abs(float(line[3].split(' ')[0])-float(same[c.metric]['mean'])) <= .0051
        assert line[4] == f"{100*float(same['top1']['mean']):.1f} %" and line[7] == same[c.metric]['n_seeds']
        law = laws.get((curve, test), {}).get('k')
        assert bool(law) == bool(line[5]) and (not law or abs(float(line[5].split(' ')[0])-float(law)) <= .0051)

def test_the_first_screen_says_what_the_readme_says(pages):
    "The difference of the exponents, and the number of images that are compared."
    text = (ROOT/'README.md').read_text()
    numbers = re.search(r'exponents k differ by\s+([\d.]+ \[[\d.]+, [\d.]+\])', text).group(1)
    n = re.search(r'([\d,]+) generated digits', text).group(1)
    first = re.sub('<[^>]*>', '', pages['.'].split('</section>')[0].split('<h1>')[1])
    assert numbers in first and f'{n} images of generated' in first

def test_hashes_are_those_of_the_tables(pages):
    listed = re.findall(r'<th scope="row">(results/[a-z_]+\.csv)</th><td>[\d,]+</td><td><code>([0-9a-f]{12})</code>',
                        pages['.'])
    assert len(listed) > 8
    for file, sha in listed:
        assert hashlib.sha256((ROOT/file).read_bytes()).hexdigest().startswith(sha)
    named = {e['at']['data-cell'].split(':')[0] for e in Tree(pages['.']).found if 'data-cell' in e['at']}
    assert named <= {Path(file).name for file, _ in listed}

def test_the_kinds_of_numbers():
    assert [shown(v, 'rate') for v in (.0156, 7.7113, 70.83, 99.7, 3200)] == ['0.0156', '7.71', '70.8', '100', '3,200']
    assert [shown(-.5, digits=1), shown(.004, 'points'), shown(math.inf)] == ['-0.5', '+0.4', '']

# ---- read aloud

@pytest.mark.parametrize('name', STUDIES)
def test_headings_tables_and_pictures_have_words(pages, name):
    accessible(pages[name])

def test_so_they_have_in_a_page_with_every_part(full):
    accessible(read(full))
    sets = Study(full).report.samples      # and strips of three and five, of photographs and of images added
    assert len(Tree(read(full)).all('img')) == len(sets)+4

def test_what_a_verdict_rests_on_is_shown(full):
    "Every number of the file's lists, and pictures of the classes that stand out, and of no other."
    text = read(full).split('id="behind"')[1].split('</section>')[0]
    said = re.sub('<[^>]*>', ' ', text)
    for words in ('the photographs alone', 'convnext_atto', '0.83', '0.61', '0.79', '150', '0.93', '0.21',
                  'recipe slow', 'three : gains', 'five : hardly recognised'):
        assert words in said.replace(':', ' :').replace('  ', ' '), words
    assert 'images of three' in text and 'images of five' in text and 'images of four' not in text
    for key in ('controls', 'anchors', 'curve', 'forecast', 'drawn', 'left_out'):
        assert f'decision.json:0:{key}.0' in text, key

def accessible(text):
    "Language, one first heading, no level left out, captions, heads with a scope, alternatives, ids that exist once."
    tree = Tree(text)
    assert tree.open == [] and tree.all('html')[0]['at']['lang'] == 'en' and tree.all('title')[0]['text'].strip()
    levels = [int(e['tag'][1]) for e in tree.all('h1', 'h2', 'h3', 'h4')]
    assert levels.count(1) == 1 and levels[0] == 1 and all(b-a <= 1 for a, b in zip(levels, levels[1:]))
    assert len(tree.all('table')) == len(tree.all('caption')) and all(e['text'].strip() for e in tree.all('caption'))
    assert all(e['at'].get('scope') in ('row', 'col') for e in tree.all('th'))
    assert all(len(e['at'].get('alt', '')) > 20 for e in tree.all('img'))
    ids = [e['at']['id'] for e in tree.found if 'id' in e['at']]
    named = [i for e in tree.found for i in e['at'].get('aria-labelledby', '').split()]
    targets = [e['at']['href'][1:] for e in tree.all('a')]
    assert len(ids) == len(set(ids)) and {*named, *targets} <= {*ids}
    for e in tree.all('svg'):
        assert e['at'].get('aria-hidden') == 'true' or e['at']['role'] == 'img' and e['at']['aria-labelledby']

# ---- seen by a browser

needs_browser = pytest.mark.skipif(chromium() is None, reason='none of these is installed: '+', '.join(NAMES))

@pytest.fixture(scope='module')
def browser():
    b = Browser()
    yield b
    b.close()

def colours(browser, *selectors):
    "Colour of what a selector finds, and of what it stands on."
    found = {}
    for s in selectors:
        found[s] = browser.run(
            f"(e => {{ let u = e; const bg = x => getComputedStyle(x).backgroundColor; while (bg(u).endsWith(', 0)')) "
            f"u = u.parentElement; return [getComputedStyle(e).color, bg(u)]; }})(document.querySelector({s!r}))")
    return found

def contrast(pair):
    "Of two colours, as WCAG has it."
    def luminance(text):
        parts = [int(v)/255 for v in re.findall(r'\d+', text)[:3]]
        r, g, b = (v/12.92 if v <= .04045 else ((v+.055)/1.055)**2.4 for v in parts)
        return .2126*r+.7152*g+.0722*b
    dark, light = sorted(map(luminance, pair))
    return (light+.05)/(dark+.05)

@needs_browser
@pytest.mark.parametrize('width', [360, 1280])
@pytest.mark.parametrize('dark', [False, True])
def test_a_page_fits_the_screen_and_asks_for_nothing(browser, full, width, dark):
    path = full/'figures'/'page.html'
    browser.open(path, width, dark=dark)
    for _ in range(2):                                                        # as it is, then with all that is folded
        assert browser.run('document.documentElement.scrollWidth') <= width
        assert browser.run('document.body.scrollWidth') <= width
        browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    apart = "!e.closest('.wide, pre, .skip, svg')"
    outside = browser.run(f"[...document.querySelectorAll('body *')].filter(e => {apart} && "
                          f"e.getBoundingClientRect().right > {width+1}).map(e => e.outerHTML.slice(0, 200))")
    assert outside == []
    assert browser.errors == [] and browser.requests == [path.resolve().as_uri()]

@needs_browser
@pytest.mark.parametrize('name', STUDIES)
def test_pages_of_other_studies_fit_the_screen(browser, pages, tmp_path, name):
    (tmp_path/'page.html').write_text(pages[name])
    browser.open(tmp_path/'page.html', 360)
    assert browser.run('document.documentElement.scrollWidth') <= 360 and browser.errors == []

@needs_browser
def test_the_browser_sees_what_is_forbidden(browser, tmp_path):
    "What the tests above look for would be found."
    path = tmp_path/'page.html'
    path.write_text('<body><img src="http://127.0.0.1:9/a.png"><p style="width:900px">wide</p></body>')
    browser.open(path, 360)
    assert len(browser.requests) == 2 and browser.errors and browser.run('document.documentElement.scrollWidth') > 360
    own = f'<meta http-equiv="Content-Security-Policy" content="{policy()}">'
    path.write_text(f'<head>{own}</head><body><script>document.title = "ran"</script></body>')
    browser.open(path, 360)
    assert browser.errors and browser.run('document.title') != 'ran'

@needs_browser
def test_words_stand_out_in_light_and_in_dark(browser, full):
    paper = []
    for dark in (False, True):
        browser.open(full/'figures'/'page.html', dark=dark)
        seen = colours(browser, 'h1', '.verdict', 'dt', '.note', 'nav a', '.src', 'th button', 'summary', '.copy',
                       'caption span', 'pre code', 'footer a', 'figcaption .src')
        assert {s: p for s, p in seen.items() if contrast(p) < 4.5} == {}
        paper.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert paper[0] != paper[1] and contrast(paper) > 10

def column(browser, i):
    "What a column of the table of all curves is sorted by, row by row."
    return browser.run(f"[...document.querySelector('#all').parentElement.querySelectorAll('tbody tr')]"
                       f".map(r => r.cells[{i}].dataset.v)")

HEAD = '[aria-labelledby=all] thead th:nth-child(%d)'

@needs_browser
@pytest.mark.parametrize('by', ['click', 'key'])
def test_the_table_sorts(browser, full, by):
    browser.open(full/'figures'/'page.html')
    def press():
        if by == 'click': return browser.click(HEAD % 4+' button')
        browser.run(f"document.querySelector('{HEAD % 4} button').focus()")
        browser.press('Enter', 13)
    before = [float(v) for v in column(browser, 3)]
    assert before != sorted(before)
    press()
    assert [float(v) for v in column(browser, 3)] == sorted(before)
    assert browser.run(f"document.querySelector('{HEAD % 4}').getAttribute('aria-sort')") == 'ascending'
    press()
    assert [float(v) for v in column(browser, 3)] == sorted(before, reverse=True)
    assert browser.run(f"document.querySelector('{HEAD % 4}').getAttribute('aria-sort')") == 'descending'
    browser.click(HEAD % 6+' button')                                         # rows without a number stay at the end
    k = column(browser, 5)
    there = [float(v) for v in k if v]
    assert there == sorted(there) and k[len(there):] == ['']*(len(k)-len(there)) != []
    assert browser.run("document.querySelectorAll('[aria-sort]').length") == 1 and browser.errors == []

@needs_browser
def test_rows_are_found_and_a_tap_says_where_a_number_stands(browser, full):
    browser.open(full/'figures'/'page.html', 360)
    shown_rows = "[...document.querySelectorAll('[aria-labelledby=all] tbody tr')].filter(r => !r.hidden).length"
    every = browser.run(shown_rows)
    browser.run("(i => { i.value = 'GUIDANCE 7.5'; i.dispatchEvent(new Event('input')); })"
                "(document.querySelector('[aria-labelledby=all] input'))")
    assert 0 < browser.run(shown_rows) < every
    browser.click('[aria-labelledby=found] data')
    assert re.fullmatch(r'exchange\.csv, row \d+, n_synthetic: 3200\.0', browser.run("document.querySelector('#place')"
                                                                                      ".textContent"))
    browser.click('h1')
    assert browser.run("document.querySelector('#place').textContent") == ''

@needs_browser
def test_without_a_script_all_is_there(browser, full):
    browser.open(full/'figures'/'page.html', 360, script=False)
    browser.ask('Emulation.setScriptExecutionDisabled', value=False)          # to ask, not to run the page's own
    assert browser.run("document.querySelectorAll('th button, input').length") == 0
    assert browser.run("document.querySelectorAll('table.sortable tbody tr').length") > 100

# ---- where it comes from

@pytest.mark.slow
def test_the_stage_report_writes_the_page(finished):
    text = (finished/'figures'/'page.html').read_text()
    assert text == page(study_content(Study(finished))) and fetched(text) == []
    assert parts(text)[0] == 'curves' and 'images' in parts(text)
    assert check_sources(text, finished)[1] == []

@pytest.mark.slow
def test_a_table_of_ones_own_has_a_page(tmp_path):
    lines = [f'{c},{n},{seed},{n**-k*(1+.02*seed)}' for c, k in (('a', .4), ('b', .2)) for n in (10, 100, 1000)
             for seed in range(3)]
    (tmp_path/'my.csv').write_text('curve,n_images,seed,value\n'+'\n'.join(lines)+'\n')
    for stage in ('laws', 'report'):
        files = ['-p', 'curves', f'{tmp_path}/my.csv', '-p', 'out', f'{tmp_path}/mine']
        sh([sys.executable, '-m', 'synthscale.run', stage, *files], ROOT)
    text = (tmp_path/'mine'/'page.html').read_text()
    os.rename(tmp_path/'mine', tmp_path/'results')
    n, wrong = check_sources(text, tmp_path)
    assert wrong == [] and n > 30 and fetched(text) == [] and parts(text)[:3] == ['curves', 'exchange', 'all']
    assert 'train as well as' in text and 'results/' not in text
