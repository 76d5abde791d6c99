// A model's Markdown as DOM nodes: paragraphs, headings, lists, quotes, code, tables, bold and italic. Nothing else, and
// never HTML: every character that is not one of those marks is text.
const FENCE = /^ {0,3}(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const DELIMITER = /^ *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
const DEEPEST = 6; // lists and quotes within one another

const INLINE = /(`+)([^]*?[^`])\1(?!`)|\*\*(?=\S)((?:`[^`]*`|[^`])*?(?:`[^`]*`|[^\s`]))\*\*|__(?=\S)([^]*?\S)__|\*(?=[^\s*])([^*]*[^\s*])\*|_(?=[^\s_])([^_]*[^\s_])_|\\([\\`*_#|>+.!~()[\]{}-])/g;
const WORD = /[\p{L}\p{N}]/u;

const inline = (text) => {
  const nodes = [];
  let plain = "", last = 0;
  const put = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  for (const found of text.matchAll(INLINE)) {
    const [all, , code, strong, stronger, italic, underlined, escaped] = found, end = found.index + all.length;
    plain += text.slice(last, found.index);
    last = end;
    const within = WORD.test(text[found.index - 1] ?? "") || WORD.test(text[end] ?? ""); // snake_case is a word
    if (code !== undefined) put(make("code", {}, code.trim() ? code.replace(/^ (.*) $/s, "$1") : code));
    else if (strong !== undefined) put(make("strong", {}, ...inline(strong)));
    else if (italic !== undefined) put(make("em", {}, ...inline(italic)));
    else if (stronger !== undefined && !within) put(make("strong", {}, ...inline(stronger)));
    else if (underlined !== undefined && !within) put(make("em", {}, ...inline(underlined)));
    else plain += escaped ?? all;
  }
  plain += text.slice(last);
  return plain ? [...nodes, plain] : nodes;
};

const cells = (line) => {
  const row = line.replaceAll("\\|", "\0").trim().replace(/^\|/, "").replace(/\|$/, "");
  return row.split("|").map((cell) => cell.trim().replaceAll("\0", "|"));
};

const table = (lines) => {
  const sides = cells(lines[1]).map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : ""));
  const row = (line, tag) => {
    const given = cells(line);
    const cell = (className, at) => make(tag, { className }, ...inline(given[at] ?? ""));
    return make("tr", {}, ...sides.map(cell));
  };
  const body = make("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  const grid = make("table", {}, make("thead", {}, row(lines[0], "th")), body);
  return make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Table" }, grid);
};

const code = (lines, fence) => {
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(fence);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  return make("pre", { tabIndex: 0 }, make("code", {}, text));
};

// One list: an item's lines are those indented below its mark, or that follow it without a blank line.
const list = (lines, depth) => {
  const [, indent, mark] = lines[0].match(ITEM), items = [];
  for (const line of lines) {
    const found = line.match(ITEM);
    if (found && found[1].length < indent.length + 2) items.push([line.slice(found[0].length)]);
    else items.at(-1).push(line.replace(/^(?: {1,4}|\t)/, ""));
  }
  const ordered = /\d/.test(mark);
  const element = make(ordered ? "ol" : "ul", {}, ...items.map((item) => listItem(item, depth)));
  if (ordered) element.start = parseInt(mark, 10);
  return element;
};

const listItem = (lines, depth) => {
  const inner = blocks(lines.join("\n"), depth + 1).map((block) => block.node());
  const first = inner[0]?.tagName === "P" ? make("span", {}, ...inner.shift().childNodes) : null;
  return make("li", {}, first, ...inner);
};

const startsBlock = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

// How many lines from `at` belong together, and the element that they make.
const blockAt = (lines, at, depth) => {
  const line = lines[at], rest = lines.slice(at + 1);
  const until = (ends) => { const stop = rest.findIndex(ends); return stop < 0 ? rest.length + 1 : stop + 1; };
  const fence = line.match(FENCE), heading = line.match(HEADING);
  if (fence) {
    const stop = rest.findIndex((each) => each.trim().startsWith(fence[1]) && !each.trim().replaceAll(fence[1][0], ""));
    return [stop < 0 ? rest.length + 1 : stop + 2, (own) => code(own, fence[1])];
  }
  if (heading) return [1, () => make("h3", {}, ...inline(heading[2]))];
  if (RULE.test(line)) return [1, () => make("hr")];
  if (depth < DEEPEST && QUOTE.test(line)) {
    const count = until((each) => !QUOTE.test(each));
    const inner = (own) => blocks(own.map((each) => each.replace(QUOTE, "")).join("\n"), depth + 1);
    return [count, (own) => make("blockquote", {}, ...inner(own).map((block) => block.node()))];
  }
  if (depth < DEEPEST && ITEM.test(line)) return [listLines(line, rest), (own) => list(own, depth)];
  if (line.includes("|") && rest[0]?.includes("-") && DELIMITER.test(rest[0]) && cells(line).length === cells(rest[0]).length) {
    return [until((each) => !each.includes("|")), table];
  }
  return [until((each) => !each.trim() || startsBlock(each)), (own) => make("p", {}, ...inline(own.join("\n").trim()))];
};

const listLines = (line, rest) => {
  const [, indent, mark] = line.match(ITEM), ordered = /\d/.test(mark);
  let count = 1;
  for (const [at, each] of rest.entries()) {
    const found = each.match(ITEM), before = at ? rest[at - 1] : line;
    if (found && found[1].length < indent.length + 2 && /\d/.test(found[2]) !== ordered) break;
    if (each.trim() && !found && !/^(?: {2}|\t)/.test(each) && (!before.trim() || startsBlock(each))) break;
    if (each.trim()) count = at + 2;
    else if (!rest[at + 1]?.trim()) break;
  }
  return count;
};

// The blocks of a text: what each was made from, and a function that makes it.
const blocks = (text, depth = 0) => {
  const lines = text.split("\n"), found = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) { at += 1; continue; }
    const [count, build] = blockAt(lines, at, depth), own = lines.slice(at, at + count);
    found.push({ source: own.join("\n"), node: () => build(own) });
    at += count;
  }
  return found;
};

// Shows a text that grows: only blocks that changed are made again, so that a selection and the reader's place stay.
const prose = (root) => {
  let shown = [];
  return (text) => {
    const next = blocks(text).map(({ source, node }, at) => {
      const same = shown[at]?.source === source;
      return same ? shown[at] : { source, element: node() };
    });
    next.forEach((block, at) => {
      const old = shown[at]?.element;
      if (!old) root.append(block.element);
      else if (old !== block.element) old.replaceWith(block.element);
    });
    for (const block of shown.slice(next.length)) block.element.remove();
    shown = next;
  };
};
