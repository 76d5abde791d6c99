// What the reader sets: kept until the tab is closed.
const FIELDS = { system: "system", temperature: "temperature", maxTokens: "max-tokens", key: "key" };

const settings = {
  read() {
    return Object.fromEntries(Object.entries(FIELDS).map(([name, id]) => [name, byId(id).value.trim()]));
  },
  keep() {
    // A browser that keeps nothing (private windows of some) leaves them in the fields.
    try { sessionStorage.setItem("onevision-edge", JSON.stringify(settings.read())); } catch {}
  },
  restore() {
    let kept = {};
    try { kept = JSON.parse(sessionStorage.getItem("onevision-edge")) ?? {}; } catch {}
    for (const [name, id] of Object.entries(FIELDS)) byId(id).value = kept[name] ?? "";
  },
  // What is wrong with a field, in one sentence, and the field; null where nothing is.
  fault() {
    const words = { temperature: "Temperature is a number from 0 to 2", "max-tokens": `The longest answer is a whole number from 1${byId("max-tokens").max && ` to ${byId("max-tokens").max}`}` };
    const field = Object.keys(words).map(byId).find((each) => !each.checkValidity());
    return field ? { field, message: `${words[field.id]}, or nothing for the server's own.` } : null;
  },
  limit(limits) {
    if (limits.max_tokens) byId("max-tokens").max = limits.max_tokens;
    byId("max-tokens-note").textContent = limits.max_tokens ? `tokens, at most ${limits.max_tokens.toLocaleString("en")}` : "tokens";
  },
  open(field = "system") {
    byId("settings").showModal();
    byId(field).focus();
  },
  close() {
    const fault = settings.fault();
    byId("settings-problem").hidden = !fault;
    byId("settings-problem").textContent = fault?.message ?? "";
    if (fault) fault.field.focus();
    else byId("settings").close();
  },
};

settings.restore();
for (const id of Object.values(FIELDS)) byId(id).addEventListener("input", settings.keep);
byId("open-settings").addEventListener("click", () => settings.open());
byId("fields").noValidate = true; // the page says in words what is wrong
byId("fields").addEventListener("submit", (event) => { event.preventDefault(); settings.close(); });
byId("settings").addEventListener("cancel", (event) => { event.preventDefault(); settings.close(); });
byId("close-picture").addEventListener("click", () => byId("picture").close());
for (const dialog of [byId("settings"), byId("picture")]) {
  dialog.addEventListener("click", (event) => {
    if (event.target !== dialog) return;
    const box = dialog.getBoundingClientRect(), { clientX: x, clientY: y } = event;
    const outside = x < box.left || x > box.right || y < box.top || y > box.bottom;
    if (outside) (dialog.id === "settings" ? settings : dialog).close();
  });
}
