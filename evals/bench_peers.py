"""The peers that bench.py measures this project against: TRL's trainers and transformers' generate, as candidates.

A candidate is a function of a folder: it reads weights, rows and settings there and returns what is timed. Each peer
runs as it comes, with its defaults wherever the result is the same; a second row has what makes it faster here and
changes no result. The packages are imported only where a candidate is built: without them bench.py measures this
project only.
"""
import json
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

import trainer

# ---- what every candidate needs, this project's too ------------------------------------------------------------------

def synchronize():
    if torch.cuda.is_available():  # kernels are only queued when a call returns
        torch.cuda.synchronize()


def read_folder(folder):
    """-> bench.json, and device and dtype as every training script chooses them."""
    inputs = json.loads(Path(folder, "bench.json").read_text())
    return inputs, trainer.start(SimpleNamespace(**inputs["run"]))  # no TrainConfig, which would claim --out


def marks(texts):
    """The reward of bench.py ppo: a function that costs nothing, so what is measured is the rest."""
    return [float(len(text)) for text in texts]


# ---- TRL -------------------------------------------------------------------------------------------------------------

def quiet(transformers):
    """Only our table is printed: no bars, no advice."""
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def trl(folder):
    """What TRL's trainers share -> inputs, the packages trl and datasets, what a trainer takes beside its rows, and
    settings: one epoch, nothing logged or saved, float32 weights, device and dtype as this project's. Among what it
    takes is a clock, which `timed` reads."""
    import datasets
    import transformers
    import trl as package

    class Clock(transformers.TrainerCallback):  # from the epoch's first batch to its last step: whole steps, no set-up
        def on_epoch_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            synchronize()
            self.end = time.perf_counter()

    quiet(transformers)
    datasets.disable_progress_bars()
    inputs, run = read_folder(folder)
    parts = dict(model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
                 processing_class=transformers.AutoTokenizer.from_pretrained(folder), callbacks=[Clock()])
    settings = dict(output_dir=folder, num_train_epochs=1, lr_scheduler_type="constant",
                    bf16=run.dtype == torch.bfloat16, use_cpu=run.device.type == "cpu",
                    dataloader_pin_memory=run.device.type == "cuda", disable_tqdm=True, report_to="none",
                    logging_strategy="no", save_strategy="no")
    return inputs, package, datasets.Dataset, parts, settings


def timed(peer, clock):
    """A trainer -> a function that trains for one epoch and returns its seconds."""
    import transformers
    peer.remove_callback(transformers.PrinterCallback)

    def epoch():
        peer.train()
        return clock.end - clock.start

    return epoch


def trl_sft(folder, **settings):
    """The same with TRL as it comes: its defaults wherever the result is the same. The rows are given as ids and
    completion mask, what TRL makes of prompt and completion itself, so that both train on the same tokens."""
    inputs, package, Dataset, parts, common = trl(folder)
    ids, masks = zip(*inputs["examples"])
    return timed(package.SFTTrainer(
        **parts, train_dataset=Dataset.from_dict({"input_ids": ids, "completion_mask": masks}),
        args=package.SFTConfig(per_device_train_batch_size=inputs["batch_size"], completion_only_loss=True,
                               learning_rate=1e-5, max_length=parts["model"].config.n_positions, **common, **settings)),
        *parts["callbacks"])


def trl_sft_tuned(folder):
    """TRL with the two settings that make it faster here and change no result."""
    return trl_sft(folder, gradient_checkpointing=False, train_sampling_strategy="group_by_length")


def trl_dpo(folder, **settings):
    """DPOTrainer makes ids of text alone. So that both train on the same tokens, the ids are put in place of what it
    has made of a row to start with."""
    inputs, package, Dataset, parts, common = trl(folder)
    peer = package.DPOTrainer(
        **parts, train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        args=package.DPOConfig(per_device_train_batch_size=inputs["batch_size"], learning_rate=1e-6, beta=0.3,
                               max_length=parts["model"].config.n_positions, **common, **settings))
    peer.train_dataset = Dataset.from_list([
        {"prompt_ids": ids[:mask.index(1)], "chosen_ids": ids[mask.index(1):],
         "rejected_ids": rejected[rejected_mask.index(1):]}
        for (ids, mask), (rejected, rejected_mask) in inputs["pairs"]])
    return timed(peer, *parts["callbacks"])


def trl_dpo_tuned(folder):
    return trl_dpo(folder, gradient_checkpointing=False)


def trl_rloo(folder, **settings):
    """TRL has no PPO any more: RLOO rolls out, scores and updates as PPO does, without a value model. beta > 0, so
    that it asks its reference too."""
    inputs, package, Dataset, parts, common = trl(folder)
    parts["processing_class"].padding_side = "left"
    return timed(package.RLOOTrainer(
        **parts, train_dataset=Dataset.from_dict({"prompt": inputs["questions"]}),
        reward_funcs=lambda completions, **_: marks(answer[-1]["content"] for answer in completions),
        args=package.RLOOConfig(per_device_train_batch_size=inputs["minibatch"],
                                generation_batch_size=len(inputs["prompts"]), num_generations=2,
                                max_completion_length=inputs["new_tokens"], learning_rate=2e-4, beta=0.2,
                                **common, **settings)),
        *parts["callbacks"])


def trl_rloo_tuned(folder):
    return trl_rloo(folder, gradient_checkpointing=False)


def transformers_generate(folder, dtype=None):
    """Prompts padded on the left, as transformers wants them; weights in the dtype of the run, or another."""
    import transformers
    quiet(transformers)
    inputs, run = read_folder(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or run.dtype).to(run.device).eval()
    model.generation_config = transformers.GenerationConfig(  # no end token: both candidates write as many tokens
        do_sample=False, max_new_tokens=inputs["new_tokens"], pad_token_id=0)
    T = max(map(len, inputs["prompts"]))
    ids, real = (torch.tensor([[0] * (T - len(row)) + row for row in rows], device=run.device)  # (B, T)
                 for rows in (inputs["prompts"], [[1] * len(prompt) for prompt in inputs["prompts"]]))

    def answers():
        return model.generate(ids, attention_mask=real)[:, T:].tolist()

    return answers


def transformers_bfloat16(folder):
    return transformers_generate(folder, torch.bfloat16)


def peft_qlora(folder):
    """-> a function that takes one step of QLoRA, as PEFT's documentation sets it up (checkpointing included)."""
    import peft
    import transformers
    quiet(transformers)
    inputs, run = read_folder(folder)
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                          bnb_4bit_compute_dtype=run.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map={"": run.device})
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), peft.LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids, mask = trainer.pad(inputs["examples"], run.device)

    def step():
        with run.autocast():
            model(ids, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
