"""The style sheet of the report: light, dark and print, without anything loaded from elsewhere."""

STYLE = """
:root{color-scheme:light dark;--page:#f4f6f8;--card:#fff;--ink:#15202b;--muted:#566472;--line:#d8dfe6;
--accent:#0f766e;--heat:15 118 110;--alert:#c2410c;--bad:194 65 12;
--d0:#2563eb;--d1:#b45309;--d2:#059669;--d3:#9333ea;--d4:#db2777;--d5:#0891b2;--d6:#65a30d;--d7:#6b7280}
@media (prefers-color-scheme:dark){:root{--page:#0e141a;--card:#161e27;--ink:#e7edf3;--muted:#9aa8b6;
--line:#2c3743;--accent:#2dd4bf;--heat:45 212 191;--alert:#fb923c;--bad:251 146 60;
--d0:#60a5fa;--d1:#fbbf24;--d2:#34d399;--d3:#c084fc;--d4:#f472b6;--d5:#22d3ee;--d6:#a3e635;--d7:#9ca3af}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:36px}h1{font-size:28px;line-height:1.2;margin:0 0 4px;letter-spacing:-.02em}
h2{font-size:18px;margin:0 0 4px;letter-spacing:-.01em}h3{font-size:15px;margin:0}
p{margin:0 0 12px}.note,header p,footer{color:var(--muted)}.note{font-size:13.5px;max-width:80ch}
h1,h2,h3,td,th,dd,p,li{overflow-wrap:break-word}.eyebrow{font-size:12.5px;font-weight:600;
letter-spacing:.06em;text-transform:uppercase;margin-bottom:6px}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:14px 0 20px;font-size:13.5px}
a{color:var(--accent);text-decoration:none}a:hover,a:focus{text-decoration:underline}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px 22px;margin:0 0 18px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:14px;padding:0;margin:0 0 18px;
background:none;border:0}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 18px}
.card dt{font-size:12.5px;color:var(--muted)}.card dd{margin:0}
.card .big{font-size:28px;font-weight:650;line-height:1.25;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.card .sub{font-size:12.5px;color:var(--muted)}.card .big.warn{color:var(--alert)}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
.wide{width:100%}th{font-weight:600;text-align:left}thead th{color:var(--muted);font-size:12.5px}
th,td{padding:6px 20px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
tbody tr:last-child>*{border-bottom:0}td.n,th.n{text-align:right}.wide .n,.wide .k{width:1%;white-space:nowrap}
.wide tr>:last-child{padding-right:0}
.heat{border-collapse:separate;border-spacing:3px}
.heat th,.heat td{border:0;padding:7px 8px}.heat th{max-width:220px}
.heat tr>:first-child{padding-left:0;text-align:left}
.heat td{min-width:66px;white-space:nowrap;text-align:center;border-radius:6px;
background:rgb(var(--heat)/calc(var(--v)*.5))}
.heat td.off{background:rgb(var(--bad)/calc(var(--v)*.75))}
.heat td.none{background:none;color:var(--muted)}.heat thead th:not(:first-child){text-align:center}
.heat td.own{outline:1.5px solid var(--accent);outline-offset:-1.5px}
.bar{display:block;height:9px;border-radius:5px;background:var(--alert);width:calc(var(--v)*100%)}
.bar.gain{background:var(--accent)}td.track{width:55%;padding-top:12px}
.dot{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px;background:var(--c)}
.dot.line{height:3px;vertical-align:middle}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;margin:6px 0 2px;padding:0;list-style:none}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:22px}
figure{margin:0}figcaption{font-size:13.5px}svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:18px}
.two section{min-width:0}
details{margin-top:10px;font-size:13.5px}summary{cursor:pointer;color:var(--accent)}
details .scroll{max-height:360px;overflow:auto;margin-top:8px}
.kind{display:inline-block;padding:0 8px;border-radius:9px;border:1px solid var(--line);font-size:12.5px}
.kind.shift,.kind.alarm{color:var(--alert);border-color:currentColor}
code,pre{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
pre{margin:8px 0 0;white-space:pre-wrap}footer{font-size:12.5px;padding-bottom:36px}
@media print{:root{color-scheme:light}nav{display:none}body{background:#fff;font-size:11pt}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}section,.card,figure,tr{break-inside:avoid}
section.long{break-inside:auto}details:not([open]){display:none}.scroll{overflow:visible;max-height:none}}
"""
