// The conversation, and the composer under it.
const question = byId("question"), turns = byId("turns");
let chat = [];          // turns: {question, images, answer, state, usage, imageTokens, …}
let attached = [];      // images of the question that is being written
let edited = null;      // the turn whose question is being written anew
let answering = null;   // the AbortController of the answer that is on its way
let model = null;       // {name, limits}, once the server has told
let following = true;   // the page stays at its end while an answer grows

// Words for a screen reader, taken away when they have been read out: they are on the page besides.
let silence = 0;
const say = (words) => {
  byId("announced").textContent = words;
  clearTimeout(silence);
  silence = setTimeout(() => { byId("announced").textContent = ""; }, 5000);
};
const notice = (trouble, remedies) => byId("notice").replaceChildren(...(trouble ? troubleView(trouble, remedies).childNodes : []));

const warn = (trouble) => notice(trouble, { close: () => { notice(null); question.focus(); } });

// The server's model and limits; a notice where it does not tell.
const meet = async () => {
  try {
    model = await served(settings.read().key);
  } catch (trouble) {
    notice(trouble, { again: meet, edit: meet, key: () => settings.open("key") });
    return;
  }
  notice(null);
  byId("model").textContent = model.name;
  document.title = `${model.name} · onevision-edge`;
  settings.limit(model.limits);
};

// Composer.
const grow = () => {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
};

const showComposer = () => {
  const busy = answering !== null, held = document.activeElement;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  if (busy && held === byId("send")) byId("stop").focus();
  if (!busy && held === byId("stop")) question.focus();
  byId("send").disabled = !question.value.trim();
  byId("editing").hidden = edited === null;
  byId("editing").firstElementChild.textContent = edited && `Question ${chat.indexOf(edited) + 1} is written anew; sending it removes what follows it.`;
  byId("greeting").hidden = chat.length > 0;
  document.body.classList.toggle("empty", !chat.length);
  question.placeholder = chat.length || attached.length ? "Ask about the image" : "Add an image and ask, or just ask";
};

const showAttached = () => {
  byId("attached").replaceChildren(...attached.map((image, at) => {
    const remove = button("Remove", () => {
      attached = attached.filter((each) => each !== image);
      showAttached();
      (byId("attached").querySelectorAll(".remove")[Math.min(at, attached.length - 1)] ?? byId("add")).focus();
    }, { className: "remove", "aria-label": `Remove ${image.name}` });
    return make("li", {}, pictureOf(image), make("span", { className: "name", title: image.name }, image.name), make("span", { title: image.from ?? "" }, sizeOf(image)), make("br"), remove);
  }));
  showComposer();
};

const attach = async (files) => {
  if (!files.length) return;
  notice(null);
  for (const file of files) {
    const most = model?.limits.max_images ?? Infinity;
    const before = edited ? chat.slice(0, chat.indexOf(edited)) : chat;
    const held = [...before.filter((turn) => turn.answer).flatMap((turn) => turn.images), ...attached];
    if (held.length >= most) {
      warn(new Trouble(`A conversation takes ${counted(most, "image")} on this server.`, "close"));
      break;
    }
    try {
      attached.push(await readImage(file, roomOf(held, model?.limits ?? {})));
    } catch (trouble) {
      warn(trouble);
    }
    showAttached();
  }
  say(`${counted(attached.length, "image")} with the question`);
  question.focus();
};

// Conversation.
const messages = (turn) => {
  const before = chat.slice(0, chat.indexOf(turn)).filter((each) => each.answer), { system } = settings.read();
  const user = ({ question: text, images }) => ({
    role: "user",
    content: images.length ? [...images.map(({ data }) => ({ type: "image_url", image_url: { url: data } })), { type: "text", text }] : text,
  });
  const spoken = before.flatMap((each) => [user(each), { role: "assistant", content: each.answer }]);
  return [...(system ? [{ role: "system", content: system }] : []), ...spoken, user(turn)];
};

const requestOf = (turn) => {
  const { temperature, maxTokens } = settings.read();
  const request = { model: model?.name ?? "default", messages: messages(turn), stream: true, stream_options: { include_usage: true } };
  if (temperature) request.temperature = Number(temperature);
  if (maxTokens) request.max_tokens = Number(maxTokens);
  return request;
};

const keepEnd = () => {
  if (following) scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
  byId("latest").hidden = following || !answering;
};

const settle = (turn) => {
  const images = turn.usage?.prompt_tokens_details?.image_tokens;
  if (typeof images !== "number") return;
  const before = chat.slice(0, chat.indexOf(turn)).filter((each) => each.answer);
  turn.imageTokens = images - before.reduce((sum, each) => sum + (each.imageTokens ?? NaN), 0);
  if (turn.images.length && turn.imageTokens >= 0) shareTokens(turn.images, turn.imageTokens);
};

const receive = async (turn, signal) => {
  for await (const chunk of answerChunks(requestOf(turn), settings.read().key, signal)) {
    const choice = chunk.choices?.[0], text = choice?.delta?.content ?? "";
    if (text && !turn.answer) turn.first = (performance.now() - turn.started) / 1000;
    turn.answer += text;
    turn.finish = choice?.finish_reason ?? turn.finish;
    turn.usage = chunk.usage ?? turn.usage;
  }
};

const ask = async (turn) => {
  const abort = new AbortController();
  Object.assign(turn, { answer: "", state: "answering", finish: null, usage: null, trouble: null, imageTokens: undefined, started: performance.now() });
  turn.view.update();
  answering = abort;
  following = true;
  showComposer();
  say("The answer is on its way.");
  let frame = 0;
  const clock = setInterval(() => {
    frame ||= requestAnimationFrame(() => { frame = 0; if (turn.state === "answering") { turn.view.update(); keepEnd(); } });
  }, 40);
  keepEnd();
  try {
    if (!model) await meet();
    notice(null); // what is wrong with the server is said below the question
    await receive(turn, abort.signal);
    turn.state = "done";
  } catch (trouble) {
    turn.state = abort.signal.aborted ? "stopped" : "failed";
    turn.trouble = abort.signal.aborted ? null : trouble instanceof Trouble ? trouble : new Trouble("The page could not read the server's answer.");
  }
  clearInterval(clock);
  turn.seconds = (performance.now() - turn.started) / 1000;
  if (answering === abort) answering = null;
  if (!chat.includes(turn)) return;
  settle(turn);
  turn.view.update();
  say([turn.answer, turn.trouble?.message, turn.state === "stopped" ? "Stopped." : ""].filter(Boolean).join(" "));
  showComposer();
  keepEnd();
};

const cut = (from) => {
  for (const turn of chat.slice(from)) turn.view.node.remove();
  chat = chat.slice(0, from);
};

const start = (text, images) => {
  const turn = { question: text, images, answer: "", state: "answering", started: performance.now() };
  turn.view = turnView(turn, { again, edit, key: enterKey, say });
  chat.push(turn);
  turns.append(turn.view.node);
  ask(turn);
};

const again = (turn) => {
  stop();
  leaveEditing();
  cut(chat.indexOf(turn));
  start(turn.question, turn.images);
  chat.at(-1).view.asked.focus({ preventScroll: true });
};

// Opens the settings at the key; with another key, asks again.
const enterKey = (turn) => {
  const before = settings.read().key;
  settings.open("key");
  const closed = () => { if (settings.read().key !== before && chat.includes(turn)) again(turn); };
  byId("settings").addEventListener("close", closed, { once: true });
};

const edit = (turn) => {
  edited = turn;
  attached = [...turn.images];
  question.value = turn.question;
  grow();
  showAttached();
  question.focus();
};

const clear = () => {
  edited = null;
  attached = [];
  question.value = "";
  grow();
  showAttached();
};

const leaveEditing = () => { if (edited) clear(); };

const send = () => {
  const text = question.value.trim(), images = attached, fault = settings.fault();
  if (!text || (answering && !edited)) return;
  if (fault) { settings.open(fault.field.id); settings.close(); return; }
  if (edited) {
    stop();
    cut(chat.indexOf(edited));
  }
  clear();
  notice(null);
  start(text, images);
};

const stop = () => answering?.abort();

const startAnew = () => {
  stop();
  answering = null;
  const held = new Set([...chat.flatMap((turn) => turn.images), ...attached]);
  cut(0);
  clear();
  notice(null);
  say("A new chat.");
  for (const { url } of held) URL.revokeObjectURL(url);
  question.focus();
};

// What the reader does.
byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
question.addEventListener("input", () => { grow(); showComposer(); });
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
  if (answering) stop();
  else leaveEditing();
});
byId("stop").addEventListener("click", stop);
byId("new").addEventListener("click", startAnew);
byId("leave-editing").addEventListener("click", () => { leaveEditing(); question.focus(); });
byId("settings").addEventListener("close", () => { if (byId("notice").childNodes.length || !model) meet(); });
byId("latest").addEventListener("click", () => { following = true; keepEnd(); });
addEventListener("scroll", () => {
  const { scrollHeight, clientHeight, scrollTop } = document.documentElement;
  following = scrollHeight - clientHeight - scrollTop < 40;
  byId("latest").hidden = following || !answering;
}, { passive: true });

// Images: picked, pasted, dropped.
const pictures = (list) => [...(list ?? [])].filter((file) => file.type.startsWith("image/") || !file.type);
byId("add").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", () => { attach([...byId("files").files]); byId("files").value = ""; });
addEventListener("paste", (event) => {
  const files = pictures(event.clipboardData?.files);
  if (!files.length || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  attach(files);
});
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
let over = 0; // elements that a drag has entered and not left
const showDrop = (depth) => { over = Math.max(0, depth); byId("drop").hidden = over === 0; };
addEventListener("dragenter", (event) => { if (carriesFiles(event)) showDrop(over + 1); });
addEventListener("dragleave", (event) => { if (carriesFiles(event)) showDrop(over - 1); });
addEventListener("dragover", (event) => { if (carriesFiles(event)) event.preventDefault(); });
addEventListener("drop", (event) => {
  showDrop(0);
  if (!carriesFiles(event)) return;
  event.preventDefault();
  attach([...event.dataTransfer.files]);
});

byId("composer").hidden = false;
showAttached();
question.focus();
meet();
