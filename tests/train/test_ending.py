"""A model stops where its answers ended in training: here, in transformers and in mlx-lm."""

from __future__ import annotations

import json

import mlx_lm
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from mlxtune.data.render import Renderer
from mlxtune.evaluate.compare import compare_run
from mlxtune.export.convert import convert_to_folder
from mlxtune.export.modelfile import modelfile
from mlxtune.fuse import fuse_run
from mlxtune.gguf.ends import end_of_turn, unstopped_end
from mlxtune.models.load import load_tokenizer
from mlxtune.models.resolve import resolve_model
from mlxtune.train.metrics import Silent
from mlxtune.train.session import fine_tune
from support.files import write_jsonl
from support.models import TEMPLATE, save_tiny_model
from support.program import mlxtune

QUESTION, ANSWER = "say it", "ok"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
ALPACA = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
# Marks, the end of a text that config and tokenizer know, the template, the end it writes.
KINDS = {
    "qwen": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], TEMPLATE, "<|im_end|>"),
    "llama3": (
        ["<|end_of_text|>", "<|begin|>", "<|start|>", "<|stop|>", "<|eot_id|>"],
        LLAMA3,
        "<|eot_id|>",
    ),
}


def save_model(folder, marks, template):
    """A tiny model whose config and tokenizer end a text with the first of the marks."""
    save_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: config["vocab_size"] - len(marks)]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(marks)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=marks[0], bos_token=marks[1]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": end}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "top_k": 7}))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def data(once):
    pair = {"prompt": QUESTION, "completion": ANSWER}
    return once("ok", lambda path: write_jsonl(path / "ok.jsonl", [pair] * 8)) / "ok.jsonl"


@pytest.fixture(scope="module")
def run(once, kind, recipe, data):
    """A run of a model that has learned one answer and its end."""
    marks, template, _ = KINDS[kind]
    model = once(f"{kind} model", lambda path: save_model(path, marks, template))
    settings = recipe(
        data,
        model={"path": str(model)},
        train={"batch_size": 4, "max_steps": 24, "learning_rate": 2e-2},
    )
    return once(f"{kind} run", lambda path: fine_tune(settings, path, Silent()))


@pytest.fixture(scope="module")
def fused(once, kind, run):
    return once(f"{kind} fused", lambda path: fuse_run(run, path / "fused")) / "fused"


def test_transformers_stops_there_with_the_fused_folder(fused, kind):
    tokenizer = AutoTokenizer.from_pretrained(fused)
    model = AutoModelForCausalLM.from_pretrained(fused)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    said = model.generate(**asked, max_new_tokens=12, do_sample=False)[0]
    answer = tokenizer.decode(said[asked["input_ids"].shape[1] :])
    assert answer == ANSWER + KINDS[kind][2]
    ends = GenerationConfig.from_pretrained(fused).eos_token_id
    assert set(ends) == set(tokenizer.convert_tokens_to_ids([KINDS[kind][2], KINDS[kind][0][0]]))
    assert GenerationConfig.from_pretrained(fused).top_k == 7  # the base's own stays


def test_mlx_lm_stops_there_with_the_fused_folder(fused):
    model, tokenizer = mlx_lm.load(str(fused))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=12) == ANSWER
    # vLLM and older readers go by config.json alone.
    ends = json.loads((fused / "config.json").read_text())["eos_token_id"]
    assert set(ends) == tokenizer.eos_token_ids


def test_eval_and_chat_stop_there(run, data, tmp_path):
    found = compare_run(run, data=data, max_tokens=12)
    assert found.tuned.exact_match == 1
    done = mlxtune("chat", str(run), "-p", QUESTION, "--max-tokens=12", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{ANSWER}\n")


def test_a_converted_folder_and_a_modelfile_say_so(run, kind, tmp_path):
    end = KINDS[kind][2]
    convert_to_folder(str(run), tmp_path / "folder")
    config = json.loads((tmp_path / "folder/generation_config.json").read_text())
    tokenizer = load_tokenizer(resolve_model(str(tmp_path / "folder")))
    assert tokenizer.convert_tokens_to_ids(end) in config["eos_token_id"]
    stops = [v for k, v in modelfile(Renderer(tokenizer), tokenizer).parameters if k == "stop"]
    assert stops == [end, KINDS[kind][0][0]]


class Notes(Silent):
    def started(self, outline):
        self.notes = outline.notes


@pytest.fixture(scope="module")
def alpaca(once):
    return once("alpaca", lambda path: save_model(path, ["</s>", "<s>"], ALPACA))


def test_answers_without_an_end_are_told_of(alpaca, data, recipe, tmp_path):
    told = Notes()
    settings = recipe(data, model={"path": str(alpaca)}, train={"max_steps": 1})
    run = fine_tune(settings, tmp_path / "run", told)
    [note] = [note for note in told.notes if "generation stops" in note]
    assert r'"\n\n"' in note and "{{ eos_token }}" in note
    _trained_on, note = compare_run(run.path, data=data, max_tokens=2).notes
    assert r'"\n\n"' in note
    done = mlxtune("chat", str(run.path), "-p", QUESTION, "--max-tokens=2", cwd=tmp_path)
    assert done.stderr.count("note: the chat template ends an answer with") == 1
    tokenizer = load_tokenizer(resolve_model(str(alpaca)))
    made = modelfile(Renderer(tokenizer), tokenizer)
    assert not [value for name, value in made.parameters if name == "stop"]


def test_text_that_is_trained_with_its_end_is_not_told_of(alpaca, recipe, tmp_path):
    write_jsonl(tmp_path / "text.jsonl", [{"text": "a text that ends"}] * 4)
    told = Notes()
    settings = recipe(tmp_path / "text.jsonl", model={"path": str(alpaca)}, train={"max_steps": 1})
    fine_tune(settings, tmp_path / "run", told)
    assert not [note for note in told.notes if "generation stops" in note]


@pytest.mark.parametrize(
    ("template", "end", "unstopped"),
    [
        ("{{ messages[-1].content }}<|end|>\n", "<|end|>", None),  # added, and not called special
        ("{{ messages[-1].content + '\\n\\n' }}", None, "\n\n"),  # white space may be a token
        ("{{ messages[-1].content }}\n</s>", "</s>", None),
        ("{{ messages[-1].content }}</s>\n<|end|>", "</s>", None),
        ("{{ messages[-1].content }}", "</s>", None),  # which is put after it
        ("{{ raise_exception('no') }}", None, None),
        (None, None, None),
    ],
)
def test_the_end_is_the_first_mark_after_an_answer(alpaca, template, end, unstopped):
    tokenizer = load_tokenizer(resolve_model(str(alpaca)))
    tokenizer.add_tokens([AddedToken("<|end|>", normalized=False), AddedToken("\n\n")])
    tokenizer.chat_template = template
    tokenizer.has_chat_template = template is not None
    found = end_of_turn(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == end
    assert unstopped_end(tokenizer) == unstopped
