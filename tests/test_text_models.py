"""Language models and captioners: one small checkpoint of each real class, made here and loaded as somebody's own; the
two miniatures of the embedded study; and what is refused."""
import hashlib, json, shutil
from types import SimpleNamespace
import numpy as np, pytest, torch, transformers
from hypothesis import given, settings, strategies as st
from conftest import ROOT
from synthscale import mini_models
from synthscale.data import build_set
from synthscale.mini_models import train_pieces
from synthscale.mini_texts import TEXT_MINIS, train_byte_tokenizer
from synthscale.models import build_model, model_key, task_of
from synthscale.params import problems
from synthscale.pipelines import folder_sha256
from synthscale.prompts import caption_table, name_finder, named_in, sentence_table
from synthscale.shards import ImageSet, load_set
from synthscale.smoke import make_inputs, smoke_params, smoke_study, smoke_text_models
from synthscale.study import Study, StudyError, read_yaml
from synthscale.text_models import (GROUP, LONGEST, Sampling, check_text_folder, load_text_model, plain_text,
                                    write_texts)

TEXTS = ['a bold zero in a sans typeface', 'number one', 'two: a hook over a flat base', '7 (regular, times)']
CHAT = "{% for m in messages %}<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    torch.set_num_threads(1)

def saved(net, folder, *processors):
    "A model as somebody would save it."
    torch.manual_seed(0)
    for p in net.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=.3)       # so that different images and prompts matter
    for part in (net, *processors):
        part.save_pretrained(folder)
    return folder

def gpt2(folder):
    tok = train_byte_tokenizer(TEXTS, 300)
    return saved(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(tok), n_embd=16, n_layer=1, n_head=2, n_positions=64)), folder, tok)

def llama_that_chats(folder):
    tok = train_byte_tokenizer(TEXTS, 300)
    tok.chat_template = CHAT
    return saved(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tok), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=tok.eos_token_id)), folder, tok)

def t5(folder):
    tok = train_pieces(TEXTS, SimpleNamespace(vocab_size=120))
    return saved(transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=len(tok), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0,
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)), folder, tok)

def bart(folder):
    tok = train_byte_tokenizer(TEXTS, 300)
    end = tok.eos_token_id
    return saved(transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=len(tok), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, bos_token_id=end,
        eos_token_id=end, pad_token_id=tok.pad_token_id, decoder_start_token_id=end, forced_eos_token_id=end)),
        folder, tok)

def looker(kind, size=16):
    "An image processor for images of 16 pixels."
    return kind(size=dict(height=size, width=size), crop_size=dict(height=size, width=size))

def blip(folder):
    tok = train_byte_tokenizer(TEXTS, 300)
    end, both = tok.eos_token_id, dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.BlipConfig(
        text_config=dict(vocab_size=len(tok), encoder_hidden_size=16, bos_token_id=end, eos_token_id=end,
                         sep_token_id=end, pad_token_id=tok.pad_token_id, **both),
        vision_config=dict(image_size=16, patch_size=8, **both), projection_dim=16, image_text_hidden_size=16)
    look = looker(transformers.BlipImageProcessor)
    return saved(transformers.BlipForConditionalGeneration(config), folder, transformers.BlipProcessor(look, tok))

def vit_gpt2(folder):
    "A VisionEncoderDecoder, as nlpconnect/vit-gpt2-image-captioning is one: with no processor for both."
    tok = train_byte_tokenizer(TEXTS, 300)
    vit = transformers.ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                 image_size=16, patch_size=8)
    gpt = transformers.GPT2Config(vocab_size=len(tok), n_embd=16, n_layer=1, n_head=2, n_positions=64,
                                  add_cross_attention=True, is_decoder=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt)
    config.decoder_start_token_id, config.pad_token_id = tok.bos_token_id, tok.pad_token_id
    config.eos_token_id = tok.eos_token_id
    net = transformers.VisionEncoderDecoderModel(config)
    net.generation_config.decoder_start_token_id = tok.bos_token_id
    return saved(net, folder, tok, looker(transformers.ViTImageProcessor))

def florence2(folder):
    bytes_ = train_byte_tokenizer(TEXTS, 300)
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_.backend_tokenizer, bos_token='<|endoftext|>', eos_token='<|endoftext|>',
        pad_token='<|pad|>', extra_special_tokens=dict(image_token='<image>'))
    tok.image_token_id = tok.convert_tokens_to_ids('<image>')
    end = tok.eos_token_id
    config = transformers.Florence2Config(
        text_config=dict(model_type='bart', vocab_size=len(tok), d_model=16, encoder_layers=1, decoder_layers=1,
                         encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
                         max_position_embeddings=64, bos_token_id=end, eos_token_id=end, decoder_start_token_id=end,
                         pad_token_id=tok.pad_token_id),
        vision_config=dict(embed_dim=(8, 8, 8, 16), num_heads=(1, 1, 1, 1), num_groups=(1, 1, 1, 1),
                           depths=(1, 1, 1, 1), window_size=2, projection_dim=16, max_position_embeddings=10,
                           max_temporal_embeddings=10),
        image_token_id=tok.image_token_id)
    look = transformers.CLIPImageProcessor(size=dict(height=64, width=64), crop_size=dict(height=64, width=64))
    look.image_seq_length = 5
    processor = transformers.Florence2Processor(look, tok, num_additional_image_tokens=1)
    return saved(transformers.Florence2ForConditionalGeneration(config), folder, processor)

WRITERS = {gpt2: 'text-generation', llama_that_chats: 'text-generation', t5: 'text2text-generation',
           bart: 'text2text-generation'}
CAPTIONERS = {blip: '', vit_gpt2: '', florence2: '<CAPTION>'}

def drawn(n=20, seed=0):
    "Images of noise."
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 1)).astype(np.uint8)

@pytest.mark.parametrize('make', [*WRITERS, *CAPTIONERS], ids=lambda f: f.__name__)
def test_each_class_writes_texts_that_depend_on_prompt_image_and_seed_alone(make, tmp_path):
    task, how = WRITERS.get(make, 'image-text-to-text'), Sampling(max_tokens=6)
    m = load_text_model(make(tmp_path/'m'), task)
    asked, images = (CAPTIONERS[make], drawn()) if make in CAPTIONERS else ('zero: ', None)
    def write(rows, k=0):
        return write_texts(m, asked, [100*k+i for i in rows], None if images is None else images[rows], how)
    rows = np.arange(GROUP+4)
    texts = write(rows)
    assert write(rows[::-1]) == texts[::-1] and write(rows[5:6]) == texts[5:6] and len(set(texts)) > GROUP//2
    assert write(rows, 1) != texts
    again = write_texts(load_text_model(tmp_path/'m', task), asked, list(rows), images, how)
    assert again == texts

def test_a_model_that_was_trained_on_conversations_is_asked_in_one(tmp_path):
    m = load_text_model(llama_that_chats(tmp_path/'m'), 'text-generation')
    plain = SimpleNamespace(**vars(m) | dict(template=None))
    asked = '<user>Write about zero.<bot>'
    assert m.template and write_texts(m, 'Write about zero.', [1, 2]) == write_texts(plain, asked, [1, 2])
    assert all('Write' not in t for t in write_texts(m, 'Write about zero.', [1, 2]))

def test_images_decide_captions(tmp_path):
    m, how = load_text_model(blip(tmp_path/'m'), 'image-text-to-text'), Sampling(max_tokens=6, temperature=0)
    a, b = (write_texts(m, '', [0]*8, drawn(8, seed), how) for seed in (0, 1))
    assert a != b

def study_with(tmp_path, models, **prompts):
    "The smoke study in a folder of its own with other models and prompts; its sets are those of the smoke study."
    p = smoke_params()
    p['models'] |= models
    p['prompts'] |= prompts
    if not (tmp_path/'sets').exists():
        (tmp_path/'sets').symlink_to(Study(smoke_study('data')).path('sets'))
    return Study(tmp_path, p)

@pytest.mark.parametrize('make', [*WRITERS, *CAPTIONERS], ids=lambda f: f.__name__)
def test_somebodys_own_model_writes_a_prompt_set(make, tmp_path):
    make(tmp_path/'own')
    (tmp_path/'own'/'pytorch_model.bin').write_bytes(b'a pickle')
    (tmp_path/'own'/'modeling_own.py').write_text('raise SystemExit')
    local = dict(type='local', input='own', task=WRITERS.get(make, 'image-text-to-text'))
    common = dict(model='own', per_class=2, max_tokens=6)
    one = dict(captions=dict(some=common | dict(set='digits', ask=CAPTIONERS[make]))) if make in CAPTIONERS else dict(
        written=dict(some=common))
    s = study_with(tmp_path, dict(own=local), **one)
    assert problems(s) == []
    folder = build_model(s, 'own')
    assert not [*folder.glob('*.bin'), *folder.glob('*.py')]
    t = (caption_table if make in CAPTIONERS else sentence_table)(s, 'some', {})
    assert t.groupby('label').size().tolist() == [2]*10 and t.prompt.is_unique
    put = t.origin.str.contains('put in front') | (make in CAPTIONERS)
    assert put.any() and all(p.startswith(f'{c}, ') for p, c in zip(t.prompt[put], t['class'][put]))

# ---- what is refused

def test_keys_of_models_are_what_they_were_before_there_were_tasks(tmp_path):
    transformers.GPT2Config().save_pretrained(tmp_path/'x')
    revision = '0123456789abcdef0123456789abcdef01234567'
    hub = dict(type='hub', input='build/nbs/02_models.ipynb', repo='lab/model', revision=revision)
    s = study_with(tmp_path, dict(a=hub, b=hub | dict(task='text-to-image'), c=hub | dict(task='text-generation')))
    before = dict(spec=dict(repo='lab/model', revision=revision, variant='', type='hub', pipeline='', upscaler=None))
    assert model_key(s, 'a') == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:32]
    assert model_key(s, 'a') == model_key(s, 'b') != model_key(s, 'c')
    assert [task_of(s.models[n]) for n in 'abc'] == ['text-to-image', 'text-to-image', 'text-generation']

def test_keys_of_the_models_that_are_committed_have_not_changed():
    "DVC keeps runs/models of the embedded study; where it is checked out, each key is computed anew."
    notes = sorted((ROOT/'runs'/'models').glob('*.json'))
    if not notes:
        pytest.skip('dvc pull brings runs/models')
    s = Study(ROOT)
    for note in notes:
        noted = json.loads(note.read_text())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('OMP_NUM_THREADS', str(noted['threads']))
            assert model_key(s, note.stem) == noted['key']

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A GPT-2 and a BLIP in folders."
    d = tmp_path_factory.mktemp('whole')
    return gpt2(d/'gpt2'), blip(d/'blip')

BROKEN = {'tokenizer.json': ('gpt2', 'no tokenizer'), 'model.safetensors': ('gpt2', 'no weights in safetensors'),
          'config.json': ('gpt2', 'config.json: no such file'), 'processor_config.json': ('blip', 'no image processor')}

@pytest.mark.parametrize('file', BROKEN)
def test_a_folder_without_one_of_its_files_is_refused(file, whole, tmp_path):
    name, words = BROKEN[file]
    task = 'text-generation' if name == 'gpt2' else 'image-text-to-text'
    shutil.copytree(whole[name == 'blip'], tmp_path/'m')
    check_text_folder(tmp_path/'m', task)
    for f in tmp_path.glob('m/vocab*'):
        f.unlink()
    (tmp_path/'m'/file).unlink()
    with pytest.raises(StudyError, match=words) as e:
        load_text_model(tmp_path/'m', task)
    assert str(tmp_path/'m') in str(e.value)

def test_a_task_that_does_not_fit_is_refused(whole, tmp_path):
    with pytest.raises(StudyError, match="'gpt2': expected one that transformers has for text2text-.*; it fits text-"):
        check_text_folder(whole[0], 'text2text-generation')
    shutil.copytree(whole[0], tmp_path/'m')
    config = json.loads((tmp_path/'m'/'config.json').read_text())
    (tmp_path/'m'/'config.json').write_text(json.dumps(config | dict(model_type='mine', auto_map={})))
    with pytest.raises(StudyError, match='code that comes with a model is not run'):
        load_text_model(tmp_path/'m', 'text-generation')
    m, b = load_text_model(whole[0], 'text-generation'), load_text_model(whole[1], 'image-text-to-text')
    for model, images, words in ((m, drawn(1), 'takes no images'), (b, None, 'needs images')):
        with pytest.raises(StudyError, match=words):
            write_texts(model, '', [0], images)
    with pytest.raises(StudyError, match='cannot write about'):
        write_texts(m, 'zero '*100, [0])                            # longer than its positions

def test_code_of_a_repository_is_not_run(whole, tmp_path):
    "A configuration of a known architecture that asks for code of its own is loaded by transformers' class."
    shutil.copytree(whole[0], tmp_path/'m')
    config = json.loads((tmp_path/'m'/'config.json').read_text())
    auto = dict(AutoModelForCausalLM='modeling_own.Own')
    (tmp_path/'m'/'config.json').write_text(json.dumps(config | dict(auto_map=auto)))
    (tmp_path/'m'/'modeling_own.py').write_text(f"open({str(tmp_path/'ran')!r}, 'w')")
    assert type(load_text_model(tmp_path/'m', 'text-generation').net) is transformers.GPT2LMHeadModel
    assert not (tmp_path/'ran').exists()

def wrong(**sections):
    "What is wrong with the smoke study with text models and other sections."
    p, more = smoke_params(), smoke_text_models()
    p['models'] |= more['models'] | sections.pop('models', {})
    p['prompts'] |= dict(written=more['written'], captions=more['captions'])
    for k, v in sections.items():
        p['prompts'][k] = p['prompts'].get(k, {}) | v
    return '\n'.join(problems(Study('.', p)))

SENTENCES, CAPTIONED = smoke_text_models()['written']['sentences'], smoke_text_models()['captions']['captioned']
HUB = dict(type='hub', input='build/nbs/02_models.ipynb', repo='lab/t5', task='text2text-generation', revision='main')
WRONG = [(dict(written=dict(names=SENTENCES)), "'names' is under prompts.sets and under prompts.written"),
         (dict(captions=dict(sentences=CAPTIONED)), "'sentences' is under prompts.written and under prompts.captions"),
         (dict(written=dict(s=SENTENCES | dict(model='mini_sd'))), 'its task is text-to-image'),
         (dict(written=dict(s=SENTENCES | dict(model='mini_captioner'))), 'its task is image-text-to-text'),
         (dict(captions=dict(s=CAPTIONED | dict(model='mini_lm'))), 'a model whose task is image-text-to-text'),
         (dict(written=dict(s=SENTENCES | dict(model='mini_ml'))), "did you mean 'mini_lm'"),
         (dict(written=dict(s=SENTENCES | dict(ask='a sentence'))), 'does not name the class'),
         (dict(written=dict(s=SENTENCES | dict(ask='{nam}'))), 'nothing fills {nam}'),
         (dict(captions=dict(s=CAPTIONED | dict(split='test'))), 'validated or tested on this one'),
         (dict(captions=dict(s=CAPTIONED | dict(split='val'))), 'validated or tested on this one'),
         (dict(captions=dict(s=CAPTIONED | dict(split='ood'))), 'validated or tested on this one'),
         (dict(captions=dict(s=CAPTIONED | dict(split='trian'))), "did you mean 'train'"),
         (dict(captions=dict(s=CAPTIONED | dict(set='rendered'))), 'expected a set of real images'),
         (dict(captions=dict(s=CAPTIONED | dict(set='names_g2'))), 'no such set under data.sets'),
         (dict(written=dict(s=SENTENCES | dict(per_class=0))), 'per_class'),
         (dict(also_named=dict(sixx=['6'])), "did you mean 'six'"),
         (dict(models=dict(t5=HUB)), 'models.t5.revision is \'main\': expected a full commit hash'),
         (dict(models=dict(t5=HUB | dict(revision='0'*40, task='image-to-text'))), 'image-to-text')]

@pytest.mark.parametrize('sections, words', WRONG)
def test_what_is_wrong_with_sentences_and_captions_is_named_before_anything_runs(sections, words):
    assert words in wrong(**sections)

def test_text_models_are_fine_and_make_no_images():
    assert wrong() == ''
    p, more = smoke_params(), smoke_text_models()
    p['models'] |= more['models']
    p['prompts'] |= dict(written=more['written'])
    p['generate']['sources']['names_g2'] |= dict(prompts='sentences')
    assert problems(Study('.', p)) == []
    p['generate']['sources']['names_g2'] |= dict(model='mini_lm')
    assert "a model whose task is text-to-image: its task is text-generation" in '\n'.join(problems(Study('.', p)))

# ---- what models say

class Says:
    "Stands for the writing of texts: what a model says, attempt by attempt."
    def __init__(self, said):
        self.said, self.calls = said, []

    def __call__(self, m, prompt, seeds, images=None, how=None):
        self.calls.append((prompt, list(seeds)))
        return [plain_text(self.said(s, len(self.calls))) for s in seeds]

@pytest.fixture
def saying(monkeypatch, tmp_path):
    "A study whose models say what a test wants."
    def make(said, **more):
        says = Says(said)
        monkeypatch.setattr('synthscale.prompts.write_texts', says)
        monkeypatch.setattr('synthscale.prompts.load_text_model', lambda *a: None)
        t = smoke_text_models()
        written, captions = ({k: v | more for k, v in t[n].items()} for n in ('written', 'captions'))
        also = dict(six=['6'], nine=['9', 'nought'])
        return study_with(tmp_path, t['models'], written=written, captions=captions, also_named=also), says
    return make

def test_an_empty_caption_is_drawn_again_and_then_an_error_that_names_image_and_model(saying):
    s, says = saying(lambda seed, call: '' if call == 1 else f'a {seed}')
    t = caption_table(s, 'captioned', {})
    first = [seeds for _, seeds in says.calls[:2]]
    assert t.origin[0].endswith('attempt 1') and first[0] != first[1] and len(first[0]) == len(first[1])
    s, says = saying(lambda seed, call: '...')
    with pytest.raises(StudyError, match=r"'mini_captioner' wrote nothing about the image train-\d+ of set"):
        caption_table(s, 'captioned', {})
    with pytest.raises(StudyError, match="'mini_lm' wrote nothing about 'zero' in 32 attempts"):
        sentence_table(s, 'sentences', {})

def test_a_model_with_little_to_say_is_told_apart_from_one_that_says_nothing(saying):
    s, _ = saying(lambda seed, call: f'zero {seed % 3}')
    with pytest.raises(StudyError, match='per_class is 4: expected at most 3: .* a higher temperature'):
        sentence_table(s, 'sentences', {})
    t = caption_table(saying(lambda seed, call: 'a bold one', per_class=50)[0], 'captioned', {})
    assert t.groupby('label').size().tolist() == [1]*10            # the same caption counts once
    assert t.names_other.tolist() == ['' if c == 'one' else 'one' for c in t['class']]

def test_sentences_name_their_class_and_odd_ones_are_brought_into_form(saying):
    s, _ = saying(lambda seed, call: f'Über\u0007 ein  Käse\u0301 {seed} '+'x'*10_000)
    t = sentence_table(s, 'sentences', {})
    assert all(len(p) <= LONGEST+10 and p.startswith(f'{c}, Über ein Käs') for p, c in zip(t.prompt, t['class']))
    assert t.origin.str.endswith('name put in front').all() and (t.names_other == '').all()
    t = sentence_table(saying(lambda seed, call: f'A bold 6 beside a nought, {seed}')[0], 'sentences', {})
    six, nine, two = (t[t['class'] == c] for c in ('six', 'nine', 'two'))
    assert six.prompt.str.startswith('A bold 6').all() and nine.prompt.str.startswith('A bold 6').all()
    assert two.prompt.str.startswith('two, A bold').all()
    assert (set(six.names_other), set(nine.names_other), set(two.names_other)) == ({'nine'}, {'six'}, {'six, nine'})

def test_more_sentences_extend_those_that_are_there(saying):
    few, many = (sentence_table(saying(lambda seed, call: f'one {seed % 50}', per_class=n)[0], 'sentences', {})
                 for n in (3, 20))
    assert many.groupby('label').head(3).reset_index(drop=True).equals(few)

def test_captions_are_of_training_images_of_the_class_and_no_label_is_seen(saying):
    s, says = saying(lambda seed, call: f'it says {seed}')
    t, m = caption_table(s, 'captioned', {}), load_set(s.path('sets', 'digits')).manifest.set_index('key')
    keys = t.origin.str.extract(r'digits/(\S+),')[0]
    assert (m.loc[keys].split == 'train').all() and m.loc[keys]['class'].tolist() == t['class'].tolist()
    assert {p for p, _ in says.calls} == {''}
    assert caption_table(s, 'captioned', {}).equals(t)

def test_a_class_without_an_image_is_an_error(saying, tmp_path, monkeypatch):
    s, _ = saying(lambda seed, call: f'a {seed}')
    every = load_set(s.path('sets', 'digits'), 'train')
    keep = np.flatnonzero(every.labels != 7)
    few = ImageSet('digits', every.images[keep], every.labels[keep], every.manifest.iloc[keep].reset_index(drop=True))
    monkeypatch.setattr('synthscale.prompts.load_set', lambda *a, **k: few)
    with pytest.raises(StudyError, match="split 'train' of set 'digits' has no image of 'seven'"):
        caption_table(s, 'captioned', {})

@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_text_becomes_plain_and_stays_so(text):
    t = plain_text(text)
    assert plain_text(t) == t and (t.isprintable() and t == ' '.join(t.split()))
    assert named_in(t, 'a', name_finder({'a': ['a'], 'b': ['b b']}))[0] in (True, False)

# ---- the miniatures

@pytest.mark.parametrize('name', TEXT_MINIS)
def test_a_miniature_that_is_killed_ends_with_the_same_files(name, tmp_path, monkeypatch):
    images = load_set(Study(smoke_study('data')).path('sets', 'rendered'), 'train')
    p = smoke_params()
    p['models'] |= smoke_text_models()['models']
    spec = Study('.', p).models[name].model_copy(update=dict(steps=30))
    TEXT_MINIS[name](images, spec, 3, tmp_path/'a', tmp_path/'whole')
    real, steps = mini_models.Loop, iter(range(1000))
    class Kept(real):
        def __post_init__(self):
            self.every = 0
            super().__post_init__()
    monkeypatch.setattr(mini_models, 'Loop', Kept)
    class Killed(Kept):
        def run(self, step_fn, **more):
            def counted(step, generator):
                if next(steps) == 20: raise KeyboardInterrupt
                return step_fn(step, generator)
            return super().run(counted, **more)
    monkeypatch.setattr(mini_models, 'Loop', Killed)
    with pytest.raises(KeyboardInterrupt):
        TEXT_MINIS[name](images, spec, 3, tmp_path/'b', tmp_path/'again')
    monkeypatch.setattr(mini_models, 'Loop', Kept)
    TEXT_MINIS[name](images, spec, 3, tmp_path/'b', tmp_path/'again')
    assert folder_sha256(tmp_path/'again') == folder_sha256(tmp_path/'whole')

FULL = dict(mini_lm=dict(type='mini_lm', input='sets/rendered', vocab_size=500, width=64, layers=2, steps=800,
                         batch_size=64, lr=5e-3),
            mini_captioner=dict(type='mini_captioner', input='sets/rendered', vocab_size=500, patch=8, width=96,
                                image_layers=2, text_layers=2, steps=1200, batch_size=128, lr=2e-3))

@pytest.mark.campaign
def test_full_sized_miniatures_name_most_classes(tmp_path):
    "What 02c_mini_texts reports, measured again on the rendered digits of the embedded study; five minutes."
    p = read_yaml(ROOT/'params.yaml')
    p['models'] = FULL
    make_inputs(tmp_path/'data')
    s = Study(tmp_path, p)
    build_set(s, 'rendered')
    names = s.study.classes
    find = name_finder({c: [c, str(i)] for i, c in enumerate(names)})
    lm = load_text_model(build_model(s, 'mini_lm'), 'text-generation')
    said = [named_in(t, c, find) for c in names for t in write_texts(lm, f'{c}: ', list(range(96)))]
    assert np.mean([own for own, _ in said]) > .85 and np.mean([bool(other) for _, other in said]) < .2
    captioner = load_text_model(build_model(s, 'mini_captioner'), 'image-text-to-text')
    held = load_set(s.path('sets', 'rendered'), 'held_out', rows=np.arange(1000))
    texts = write_texts(captioner, '', list(range(1000)), held.images, Sampling(temperature=0))
    right = [named_in(t, names[label], find) == (True, []) for t, label in zip(texts, held.labels)]
    assert np.mean(right) > .75
