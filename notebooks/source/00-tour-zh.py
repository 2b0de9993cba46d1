# %% [markdown] translated_from="00-tour.py" sha256="4f5e0d776a72a1f4d26ce7680d10cfd3aa7f3e2b75d770d1abb95ecb7419a8fe"
# # 00 · 导览：十分钟看懂 GLM-4.5
#
# *阅读 10 分钟 · 运行 10 秒 · 需要 Python 和矩阵乘法*
#
# GLM-4.5 是一个 3550 亿参数的语言模型，每个词元（token）只用到其中的 320 亿。本篇带你把一个结构相同、小到能放进 notebook 的模型从头到尾走一遍：从一行文字到下一个词元，到带思考的回答，到工具调用，再到一步训练。每一站都是后面某一篇的预告。（英文原版：[00-tour](00-tour.ipynb)；后面各篇目前只有英文，术语的中英对照见 [术语表](../docs/glossary.md)。）

# %% [markdown]
# ## 问题
#
# 输入一段文字，输出接下来的一小段文字。这中间发生了什么？
#
# `glm-tiny` 是专门为这套教程训练的，训练数据是 Python 代码和一些小题目。它只是个玩具：能让你看清混合专家模型（MoE）是怎么运转的，但看不出大模型能做到什么。

# %%
import numpy as np

import minglm
from minglm.look import plots

np.set_printoptions(precision=3, suppress=True, linewidth=110)
model = minglm.load("glm-tiny")
model

# %% [markdown]
# 表里的字母是各个轴的名字，在整套教程里含义不变：每个词元有**隐藏维度** D = 192 个数，层数 L = 6，专家数 E = 16，每个词元只交给其中 K = 2 个专家。下面把 GLM-4.5 本身的尺寸也打印出来。一个词元只激活一部分参数，这正是专家的意义所在。

# %%
for name, config in [("glm-tiny", model.config), ("GLM-4.5", minglm.PRESETS["GLM-4.5"])]:
    counts = config.count_parameters()
    c = f"D = {config.hidden_size:,}, L = {config.num_hidden_layers}, E = {config.n_routed_experts}"
    print(f"{name}: {c}, K = {config.num_experts_per_tok}; {counts.active / counts.total:.0%} of the parameters active")
assert counts.report_total // 10**9 == 355  # as its authors count
assert counts.report_active // 10**9 == 32

# %% [markdown]
# （MTP：多猜一个词元的附加层，见 [09](09-mtp.ipynb)。）
#
# ## 从文字到一行行数字
#
# 提示词先被切成**词元**，每个词元再换成一张表中的一行，这一行就是它的**词嵌入**（embedding）。详见 [01-tokens](01-tokens.ipynb)。`trace` 会运行模型，并按名字保留它算出的每一个数组。

# %%
prompt = "def add(a, b):\n    return a +"
trace = model.trace(prompt)
print(trace.tokens)
print(len(trace), "arrays; the first:", trace["embed_tokens"].shape)
assert np.array_equal(trace["embed_tokens"][0], model.params.embed_tokens.weight[trace.ids[0]])

# %% [markdown]
# ## 六层，每一层都在做加法
#
# 一层有两部分。**注意力**让每个词元从它前面的词元那里读取信息；随后的 **MLP**（几次矩阵乘法，中间夹一个非线性；第 1 到 5 层换成了**专家**）对每个词元单独处理。两者都不会覆盖原来那一行，而是把结果加上去。所以最后一层之后的每一行，就是词嵌入加上一路上加进来的所有东西：[02-residual-stream](02-residual-stream.ipynb)。

# %%
added = [trace[f"layers.{i}.{part}"] for i in range(6) for part in ("self_attn.o", "mlp.out")]
np.testing.assert_allclose(trace["embed_tokens"] + sum(added), trace["layers.5.out"], atol=1e-3)
for name in trace.names("layers.1.*"):
    if ".experts." not in name:
        print(f"{name:38} {trace[name].shape}")

# %% [markdown]
# 这就是一层的全部步骤，按计算顺序排列，只略去了各个专家内部的数组。注意力靠旋转每一行来得知词元的位置（[03](03-rotary-positions.ipynb)），谁从谁那里读取则记在 `probs` 里（[04](04-attention.ipynb)）。`mlp` 下面是路由器和专家（[05](05-router.ipynb)、[06](06-experts.ipynb)）。
#
# ## 谁去了哪里
#
# 在每一层，路由器为每个词元从 16 个专家里选出 2 个，并决定每个专家的话有多大分量。图中每个词元占一行，每一层占两格：上面是专家编号，下面是权重。

# %%
routing = trace.routing
assert routing.indices.shape == (10, 5, 2)  # tokens, layers with experts, picks
assert routing.indices[0, :2].tolist() == [[15, 4], [9, 5]]
plots.plot_picks(routing.indices, routing.weights, trace.tokens, routing.experts, routing.layers, name="glm-tiny")

# %% [markdown]
# 读一行试试：`def` 在第 1 层去了专家 15 和 4，在第 2 层去了 9 和 5。两个权重之和是 1.5。有些词元几乎只听一个专家的，有些则两个都听。这一层的 5 号专家和下一层的 5 号专家除了编号相同，没有任何关系。各个专家的负载是否均衡，见 [08a](08a-expert-load.ipynb)；它们是否各有专长，见 [08b](08b-specialisation.ipynb)。
#
# ## 下一个词元
#
# 最后一行会与词表中 2048 个词元各自对应的一行作点积，结果叫 **logits**；softmax（各自取 e 的幂，再除以它们的和）再把它们变成概率。`return a +` 后面应该是什么？

# %%
from minglm.model import softmax

probs = softmax(trace["logits"][0, -1])
for i in np.argsort(-probs)[:3]:
    print(f"{model.tokenizer.token(int(i))!r:8} {probs[i]:.1%}")
assert model.tokenizer.token(int(probs.argmax())) == "␣b"

# %% [markdown]
# 是 `␣b`，而且几乎没有犹豫：看来模型回头看了函数的参数（见问题 1）。把这一切串成一个完整的故事，见 [07-forward-step](07-forward-step.ipynb)。
#
# 想写得更长，就把这个词元接在后面再问一次。所谓**生成**，不过如此；怎样用缓存让它变便宜，见 [04b](04b-generation.ipynb)；[09](09-mtp.ipynb) 则介绍能再往后多猜一个词元的那一层。

# %%
again = prompt + " b"
first = model.generate(prompt, 2).ids
assert model.generate(again, 1).ids == first[1:]
print(again + model.generate(again, 12).text)

# %% [markdown]
# 它接着写出了一段看起来像 Python 的东西。别指望更多。
#
# ## 思考
#
# GLM-4.5 可以先思考再回答，也可以直接回答，区别只在于提示词里的几个词元。我们的问题是：求十个数字之和，只要个位数。正确答案是 2。

# %%
question = [{"role": "user", "content": "3+8+1+9+4+2+7+7+5+6 mod 10"}]
thinking = model.chat_template.render(question)
direct = model.chat_template.render(question, enable_thinking=False)
print(repr(thinking), repr(direct), sep="\n")

# %% [markdown]
# 运行下一格之前先猜一猜：两个提示词交给同一个模型，权重完全相同。哪一个会答对？

# %%
with_thinking, at_once = (model.generate(p, 100) for p in (thinking, direct))
for answer in (with_thinking, at_once):
    print(f"{len(answer.ids)} tokens: {answer.text}\n")
assert with_thinking.text.endswith("\n2")
assert not at_once.text.endswith("2")

# %% [markdown]
# 每写出一个词元，就要把六层重新走一遍，而后面的词元可以读到前面写下的内容。有思考时，走的次数足够把九次加法一步一步做完；没有思考时，一切都得在写出答案的那一遍里完成，只能靠猜，这一次就猜错了。[13](13-thinking-and-tools.ipynb) 用很多道题来衡量这一点。
#
# ## 工具
#
# 提示词里还可以描述一个函数。模型会写出一次调用，由外面的程序执行，结果作为新的一轮接在对话后面。

# %%
from minglm.data.calculator import calculate
from minglm.data.chats import CALCULATOR
from minglm.text.tools import run_tools

asked = [{"role": "user", "content": "(4821+937)*3"}]
said = run_tools(
    lambda p: model.generate(p, 100).text, asked, [CALCULATOR], {"calculator": calculate}, model.chat_template
)
for message in said:
    print(message)
assert said[-1]["content"] == str((4821 + 937) * 3)

# %% [markdown]
# 一共四轮：提问、调用、计算器的返回值、回答。模型没有自己做乘法；它知道该去问谁。
#
# ## 一步训练
#
# 这些权重是怎么来的？就是靠这样的步骤，一共 6000 步（见[模型卡](../weights/glm-tiny/README.md)）。**损失**表示模型对一段文字有多意外（实际出现的词元的概率取 −ln，单位是 *nat*）；**梯度**则告诉每个权重，往哪个方向走会更意外。把所有权重都朝相反方向挪一小步。

# %%
text = "def area(width, height):\n    return width * height\n"
loss, grads = model.loss_and_grads(model.as_ids(text), mtp_weight=0)
gradient = dict(minglm.walk(grads))
square = sum(float((g.astype(float) ** 2).sum()) for g in gradient.values())
print(f"{len(gradient)} gradients, loss {loss.main:.4f} nats per token, length of the gradient {square**0.5:.2f}")

# %% [markdown]
# 步子足够小时，损失的下降量应当等于步长乘以梯度长度的平方。来看看是不是这样。

# %%
moved = minglm.load("glm-tiny")
step = 1e-5
for name, weight in minglm.walk(moved.params):
    weight -= np.float32(step) * gradient[name]  # in place: the arrays are the model's own
after, _ = moved.loss_and_grads(moved.as_ids(text), mtp_weight=0)
print(f"loss {loss.main:.5f} -> {after.main:.5f}; expected {loss.main - step * square:.5f}")
assert abs((loss.main - after.main) / (step * square) - 1) < 0.05

# %% [markdown]
# 果然如此。怎样手工把梯度一部分一部分地反向算出来，见 [10a](10a-backward.ipynb)、[10b](10b-backward-attention.ipynb) 和 [10c](10c-backward-experts.ipynb)；好的优化器拿梯度做什么，见 [11](11-training.ipynb)。
#
# ## 学到了什么，接下来读什么
#
# 词元变成一行行数字；每一层把注意力和几个专家的意见加上去；最后一行再与整个词表比较。思考和工具调用，对这台机器来说只是更多的文字。训练则是把这条路反过来走。
#
# 后面几篇会把权重压到很少的比特（[12](12-small-floats.ipynb)）、让模型跑得更快（[14](14-speed.ipynb)）、在运行中改动它（[15](15-patching.ipynb)），还会带你找 bug（[16](16-bug-hunt.ipynb)）。如果你对 NumPy 的轴和 `einsum` 还不熟，先读 [00b-numpy](00b-numpy.ipynb)；否则直接读 [01-tokens](01-tokens.ipynb)。
#
# ## 思考题
#
# 1. 给参数改名：`def add(x, y):` 和 `return x +`。模型跟得上吗？换成 `def add(a, b, c):` 呢？
# 2. 用带思考的提示词，但替它写下错误的第一步 `<think>3+8=5`。模型会自己纠正，还是将错就错？
# 3. 把训练的步长放大到三倍，即 3e-5。损失下降得比梯度承诺的多得多。比较 `model.trace(text).routing.indices` 与 `moved` 的路由：发生了什么梯度不知道的事？
