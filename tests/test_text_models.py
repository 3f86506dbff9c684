"""Language models and captioners: one small checkpoint of each real class, made here and loaded as somebody's own; the
two miniatures of the embedded study; and what is refused."""
import json, shutil
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch, transformers
from hypothesis import given, settings, strategies as st
from conftest import ROOT
from synthscale.mini_models import train_pieces
from synthscale.mini_texts import TEXT_MINIS, train_byte_tokenizer
from synthscale.models import build_model, model_key, task_of
from synthscale.params import problems
from synthscale.pipelines import folder_sha256
from synthscale.prompts import WrittenSet, CaptionSet, caption_table, check_caption_split, name_finder, named_in, sentence_table
from synthscale.shards import ImageSet, load_set
from synthscale.smoke import smoke_params, smoke_study, smoke_text_models
from synthscale.study import Study, StudyError, read_yaml
from synthscale.text_models import (GROUP, LONGEST, Sampling, check_text_folder, load_text_model, plain_text,
                                    wanted_text_files, write_texts)

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
    "A VisionEncoderDecoder, as nlpconnect/vit-gpt2-image-captioning is one: no processor for images and texts together."
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
