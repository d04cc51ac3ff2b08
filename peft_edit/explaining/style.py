"""The stylesheet of the token view."""

# Levels differ in lightness, and lines in their form, so that they can be told apart in black and white too.
TOKEN_VIEW_CSS = """\
.tv-view {
  --tv-paper: #ffffff; --tv-ink: #1a1a1a; --tv-line: #1a4fa3;
  --tv-kl1: #fff3c4; --tv-kl2: #ffd873; --tv-kl3: #f59e3b; --tv-kl4: #a33200;
  --tv-ink1: #1a1a1a; --tv-ink2: #1a1a1a; --tv-ink3: #1a1a1a; --tv-ink4: #ffffff;
  background: var(--tv-paper); color: var(--tv-ink); padding: 0.5em;
}
@media (prefers-color-scheme: dark) {
  .tv-view {
    --tv-paper: #16181c; --tv-ink: #e8e8e8; --tv-line: #8ab4ff;
    --tv-kl1: #3b3011; --tv-kl2: #6b4700; --tv-kl3: #cf8a20; --tv-kl4: #ffdf9e;
    --tv-ink1: #f2f2f2; --tv-ink2: #f2f2f2; --tv-ink3: #16181c; --tv-ink4: #16181c;
  }
}
.tv-view .tv-text { line-height: 2; margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.tv-view .tv-token {
  border-bottom: 3px none var(--tv-line); padding: 0 0 1px;
  -webkit-print-color-adjust: exact; print-color-adjust: exact;
}
.tv-view .tv-kl1 { background: var(--tv-kl1); color: var(--tv-ink1); }
.tv-view .tv-kl2 { background: var(--tv-kl2); color: var(--tv-ink2); }
.tv-view .tv-kl3 { background: var(--tv-kl3); color: var(--tv-ink3); }
.tv-view .tv-kl4 { background: var(--tv-kl4); color: var(--tv-ink4); }
.tv-view .tv-edit1 { border-bottom: 2px dotted var(--tv-line); }
.tv-view .tv-edit2 { border-bottom: 2px dashed var(--tv-line); }
.tv-view .tv-edit3 { border-bottom: 2px solid var(--tv-line); }
.tv-view .tv-edit4 { border-bottom: 5px double var(--tv-line); }
.tv-view .tv-legend { font-size: 0.85em; line-height: 2; margin: 0.75em 0; }
.tv-view .tv-scroll { overflow-x: auto; }
.tv-view table { border-collapse: collapse; font-size: 0.85em; }
.tv-view th, .tv-view td { padding: 0.15em 0.75em 0.15em 0; text-align: left; vertical-align: top; white-space: pre; }
"""
