"""Chat templates as models have them: ChatML, with generation markers, and one that forgets reasoning."""

HEADER = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

CHATML = HEADER + "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
MARKED = (
    HEADER
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    + "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    + PROMPT
)
# Qwen3's way: the last turn has its reasoning, empty or not, and earlier ones have lost it
FORGETFUL = (
    HEADER
    + "{% if m.role == 'assistant' and loop.last %}"
    + "{{ '<think>\n' + m.get('thought', '') + '\n</think>\n\n' }}{% endif %}"
    + "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    + PROMPT[: -len("{% endif %}")]
    + "{% if thinking is defined and not thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
