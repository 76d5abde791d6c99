// One question and its answer, as they are seen.
const STAGES = [["queue", "s5"], ["preprocess", "s0"], ["vision_encoding", "s1"], ["prepare_embeddings", "s2"], ["prefill", "s3"], ["decode", "s4"]];

const figureOf = (image) => {
  const tokens = image.tokens === null ? "" : `, ${counted(image.tokens, "token")}`;
  const lines = [image.name, sizeOf(image) + tokens, image.from].filter(Boolean);
  return make("figure", {}, pictureOf(image), make("figcaption", {}, ...lines.map((line) => make("div", {}, line))));
};

// The images of a turn; where their tokens are known together only, their sum.
const figuresOf = (turn) => {
  const together = turn.imageTokens > 0 && turn.images.length > 1 && turn.images[0].tokens === null;
  const sum = together ? [make("p", { className: "note" }, `Together ${counted(turn.imageTokens, "token")}.`)] : [];
  return [...turn.images.map(figureOf), ...sum];
};

// The tokens of an answer in words: the prompt's, those of images, those that caches had (of the prompt's keys and
// values; of images that were encoded before), the answer's.
const tokenWords = (turn) => {
  const { prompt_tokens, completion_tokens, prompt_tokens_details: details = {} } = turn.usage;
  const images = details.image_tokens ? `, ${details.image_tokens.toLocaleString("en")} of images` : "";
  const cached = [[details.cached_tokens, "of the prompt"], [details.cached_image_tokens, "of images"]]
    .filter(([count]) => count).map(([count, words]) => `${count.toLocaleString("en")} ${words}`);
  const spared = cached.length ? ` Not computed again: ${cached.join(", ")}.` : "";
  return `Prompt ${counted(prompt_tokens, "token")}${images}; answer ${counted(completion_tokens, "token")}.${spared}`;
};

// The stages as a bar and in words; the rest of the time that passed here is the way to the server and back.
const stageView = (timings, seconds) => {
  const stages = STAGES.filter(([name]) => timings[name] >= 0).map(([name, kind]) => [name.replaceAll("_", " "), kind, timings[name]]);
  const rest = seconds - stages.reduce((sum, [, , time]) => sum + time, 0);
  if (rest > 0) stages.push(["the rest", "rest", rest]);
  const bar = make("div", { className: "bar", "aria-hidden": "true" });
  const list = make("dl", { className: "stages" });
  for (const [name, kind, time] of stages) {
    const part = make("span", { className: kind });
    part.style.flexGrow = 1000 * time; // a sum below 1 would leave room
    bar.append(part);
    list.append(make("div", { className: kind }, make("dt", {}, name), " ", make("dd", {}, duration(time))));
  }
  return [bar, list];
};

// What an answer took: the server's own numbers, or where it gave none the time that passed here.
const measuredView = (turn) => {
  const timings = turn.usage?.timings ?? {};
  const first = timings.time_to_first_token ?? turn.first, speed = timings.tokens_per_second;
  const words = [`${duration(turn.seconds)}`];
  if (typeof first === "number") words.push(`first token after ${duration(first)}`);
  if (speed > 0) words.push(`${speed.toFixed(speed < 100 ? 1 : 0)} tokens/s`);
  const total = make("p", {}, make("b", {}, words.join(", ")));
  const tokens = turn.usage ? make("p", {}, tokenWords(turn)) : null;
  return make("div", { className: "measured" }, total, ...(turn.usage?.timings ? stageView(timings, turn.seconds) : []), tokens);
};

const NOTES = {
  stopped: "Stopped.",
  length: "The answer reached its limit of tokens. The limit is in Settings.",
  content_filter: "The server withheld the rest.",
};

// The view of a turn: {node, update()}. `actions`: again, edit, key, say; each takes the turn, say takes words.
const turnView = (turn, actions) => {
  const figures = make("div", { className: "figures" });
  const asked = make("h2", { className: "asked", tabIndex: -1 }, turn.question);
  const answer = make("div", { className: "answer" }), show = prose(answer);
  const waiting = make("p", { className: "waiting", "aria-hidden": "true" });
  const after = make("div");
  const said = make("div", { className: "said" }, asked, answer, waiting, after);
  const node = make("article", { className: "turn" }, figures, said);
  let state = null;

  const copyButton = () => {
    const element = button("Copy", async () => {
      const words = await copy(turn.answer).then(() => "Copied", () => "Not copied");
      element.textContent = words;
      actions.say(words);
      setTimeout(() => { element.textContent = "Copy"; }, 1500);
    });
    return element;
  };
  const ending = () => {
    const parts = [];
    const note = NOTES[turn.state === "stopped" ? "stopped" : turn.finish];
    if (note) parts.push(make("p", { className: "note" }, note));
    if (turn.trouble) parts.push(troubleView(turn.trouble, { again: () => actions.again(turn), key: () => actions.key(turn), edit: () => actions.edit(turn) }));
    if (turn.state !== "answering" && !turn.answer) parts.push(make("p", { className: "note" }, "Without an answer, the question is left out of what follows."));
    if (turn.state !== "answering" && turn.answer) parts.push(measuredView(turn));
    const again = turn.trouble?.remedy === "again" ? null : button("Ask again", () => actions.again(turn));
    const acts = [turn.answer ? copyButton() : null, again, button("Edit", () => actions.edit(turn), { "aria-label": "Edit the question" })];
    return [...parts, make("div", { className: "acts" }, ...acts)];
  };

  const update = () => {
    show(turn.answer);
    const answering = turn.state === "answering";
    const passed = answering ? `${((performance.now() - turn.started) / 1000).toFixed(1)} s` : "";
    waiting.textContent = answering && !turn.answer ? `${turn.images.length ? "looking" : "reading"} … ${passed}` : passed;
    waiting.hidden = !answering;
    if (state === turn.state) return;
    state = turn.state;
    node.classList.toggle("streaming", answering);
    node.classList.toggle("out", !answering && !turn.answer);
    node.setAttribute("aria-busy", answering);
    figures.replaceChildren(...figuresOf(turn));
    after.replaceChildren(...(answering ? [] : ending()));
  };
  update();
  return { node, update, asked };
};

// One sentence of what went wrong and a button to go on; where the server says how long to wait, the button counts.
const troubleView = (trouble, remedies) => {
  const names = { again: "Ask again", key: "Enter the key", edit: "Edit the question", close: "Close" };
  const press = button(names[trouble.remedy], remedies[trouble.remedy]);
  let left = trouble.wait;
  const count = () => {
    press.disabled = left > 0;
    press.textContent = names[trouble.remedy] + (left > 0 ? ` in ${left} s` : "");
    if (left-- > 0) setTimeout(count, 1000);
  };
  count();
  return make("p", { className: "problem" }, trouble.message, " ", press);
};
