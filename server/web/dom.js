// Elements. Text becomes text nodes and nothing else: what a model or a server says is never read as HTML.

/** An element with properties (`class`, `data` and `aria-...` included) and children, which are nodes or texts. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") node.className = value;
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("aria-") || name === "role" || name === "for") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Says something to screen readers, politely. */
export function announce(text) {
  byId("status").textContent = text;
}
