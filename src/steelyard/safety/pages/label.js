"use strict";

// -- the sheet: rows of {key, prompt, completion, label}; nothing here touches the page --

const LABELS = ["yes", "no", "skip"];

/** Index of the first row without a label, or the number of rows. */
function position(rows) {
  const found = rows.findIndex((row) => row.label === "");
  return found < 0 ? rows.length : found;
}

/** Take the label of the last labelled row before the present one away; whether there was one. */
function undo(rows) {
  for (let i = position(rows) - 1; i >= 0; i--) {
    if (rows[i].label !== "") {
      rows[i].label = "";
      return true;
    }
  }
  return false;
}

/** JSON lines, as `steelyard scorer calibrate` reads them. */
function written(rows) {
  return rows.map((row) => JSON.stringify(row) + "\n").join("");
}

/** Add the labels of a half-filled file; a row without one there keeps its own. Throws an Error, and changes nothing,
 * if the file is of another sheet. */
function take(rows, text) {
  const known = new Map(rows.map((row) => [row.key, row]));
  const labels = new Map();
  text.split("\n").forEach((line, number) => {
    if (line.trim() === "") return;
    let row = null;
    try {
      row = JSON.parse(line);
    } catch {
      throw new Error(`line ${number + 1} is not JSON`);
    }
    if (row === null || !known.has(row.key)) throw new Error(`line ${number + 1} is of another sheet`);
    if (row.label !== "" && !LABELS.includes(row.label)) throw new Error(`line ${number + 1} has an unknown label`);
    labels.set(row.key, row.label);
  });
  if (labels.size === 0) throw new Error("it holds no row");
  labels.forEach((label, key) => {
    if (label !== "") known.get(key).label = label;
  });
}

// -- the page --

function start() {
  const at = (id) => document.getElementById(id);
  const sheet = JSON.parse(at("sheet").textContent);
  const rows = sheet.rows;
  const place = "steelyard-labels-" + sheet.id;

  function say(text) {
    at("said").textContent = text;
  }

  function keep() {
    try {
      localStorage.setItem(place, JSON.stringify(rows.map((row) => row.label)));
    } catch {
      say("This browser keeps nothing for this page: download your labels before you close it.");
    }
  }

  function recall() {
    try {
      const labels = JSON.parse(localStorage.getItem(place));
      if (!Array.isArray(labels) || labels.length !== rows.length) return;
      labels.forEach((label, i) => {
        if (LABELS.includes(label)) rows[i].label = label;
      });
    } catch {
      say("This browser keeps nothing for this page: download your labels before you close it.");
    }
  }

  function show() {
    const now = position(rows);
    const done = rows.filter((row) => row.label !== "").length;
    const over = now === rows.length;
    at("count").textContent = `${done} of ${rows.length}`;
    at("bar").value = done;
    at("bar").max = rows.length;
    at("text").hidden = over;
    at("over").hidden = !over;
    // The texts are a model's words: they are set as text, never as HTML.
    at("prompt").textContent = over ? "" : rows[now].prompt;
    at("completion").textContent = over ? "" : rows[now].completion;
    at("empty").hidden = over || rows[now].completion.trim() !== "";
    for (const label of LABELS) at(label).disabled = over;
    at("undo").disabled = done === 0;
  }

  function label(value) {
    const now = position(rows);
    if (at("work").hidden || now === rows.length) return;
    rows[now].label = value;
    say("");
    keep();
    show();
    window.scrollTo(0, 0);
  }

  function back() {
    if (!at("work").hidden && undo(rows)) {
      say("");
      keep();
      show();
    }
  }

  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([written(rows)], { type: "application/jsonl" }));
    link.download = "labels.jsonl";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  async function load(event) {
    const file = event.target.files[0];
    if (!file) return;
    try {
      take(rows, await file.text());
      say(`Labels taken from ${file.name}.`);
      keep();
      show();
    } catch (error) {
      say(`${file.name}: ${error.message}. Nothing was changed.`);
    }
    event.target.value = "";
  }

  function begin() {
    at("intro").hidden = true;
    at("work").hidden = false;
    show();
  }

  const keys = { y: "yes", n: "no", s: "skip" };
  document.addEventListener("keydown", (event) => {
    // A key that is held down, or one of a short cut, is no label.
    if (event.repeat && event.key === "Enter") event.preventDefault(); // on a button
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    if (Object.hasOwn(keys, key)) label(keys[key]);
    else if (key === "u") back();
  });
  for (const value of LABELS) at(value).addEventListener("click", () => label(value));
  at("undo").addEventListener("click", back);
  at("begin").addEventListener("click", begin);
  at("load").addEventListener("change", load);
  for (const id of ["download", "finish"]) at(id).addEventListener("click", download);
  recall();
  const done = rows.filter((row) => row.label !== "").length;
  if (done > 0) at("begin").textContent = `Go on (${done} of ${rows.length} are labelled)`;
}

if (typeof document === "object") start();
