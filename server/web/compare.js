// Two answers to one prompt: where their texts part.

/** The first character in which two texts differ; null while one is only the beginning of the other and may go on. */
export function partingOf(a, b, areComplete) {
  const length = Math.min(a.length, b.length);
  let i = 0;
  while (i < length && a[i] === b[i]) i += 1;
  if (i < length) return i;
  return areComplete && a.length !== b.length ? i : null;
}

/** Marks the parting in two token texts, and says what came of it. */
export function markParting(a, b, areComplete) {
  const offset = partingOf(a.text, b.text, areComplete);
  a.markAt(offset);
  b.markAt(offset);
  if (offset !== null) return said(tokensBefore(a, offset), tokensBefore(b, offset));
  return areComplete ? "The two texts are the same." : "";
}

function said(a, b) {
  if (a === 0 && b === 0) return "The texts part at their first token.";
  const counted = `${a} ${a === 1 ? "token" : "tokens"}`;
  return a === b ? `The texts part after ${counted}.` : `The texts part after ${counted} of A and ${b} of B.`;
}

function tokensBefore(text, offset) {
  let end = 0;
  const i = text.tokens.findIndex((token) => (end += token.text.length) > offset);
  return i < 0 ? text.tokens.length : i;
}
