"""The page's style sheet: light and dark, wide and narrow, on paper too.

Colors of curves are Okabe and Ito's, which people with color blindness tell apart; on a dark ground
the dark ones are lighter.
"""

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1c2430;--soft:#5b6675;--line:#dfe3e8;
--grid:#e9ecf0;--accent:#0067a5;--good:#00735a;--warn:#9a4a00;
--c0:#0072b2;--c1:#d55e00;--c2:#00916a;--c3:#b0578d;--c4:#b07d00;--c5:#6b7280}
@media (prefers-color-scheme:dark){:root{--bg:#12161c;--card:#1b212a;--ink:#e6eaf0;--soft:#9aa6b5;
--line:#2c3541;--grid:#27303b;--accent:#6cb8ee;--good:#4cc9a4;--warn:#f0a35e;
--c0:#56b4e9;--c1:#f28e4b;--c2:#3ccb9f;--c3:#e59ac7;--c4:#e8c14a;--c5:#9aa6b5}}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}
.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:1180px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:26px;line-height:1.25;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:19px;margin:40px 0 12px}
p{margin:8px 0}a{color:var(--accent)}
.state{color:var(--soft);margin:0 0 18px;overflow-wrap:anywhere}
.tag{display:inline-block;font-size:12px;line-height:1.5;padding:0 8px;border-radius:9px;
background:color-mix(in srgb,var(--good) 14%,transparent);color:var(--good);font-weight:600;
white-space:nowrap}
.tag.open{background:color-mix(in srgb,var(--warn) 16%,transparent);color:var(--warn)}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:14px}nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(155px,1fr));gap:12px;margin:20px 0}
.card,figure,.box{background:var(--card);border:1px solid var(--line);border-radius:10px}
.card{padding:12px 16px}.card b{display:block;font-size:25px;line-height:1.3;font-weight:650}
.card span{color:var(--soft);font-size:13.5px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:16px}
figure{margin:0;min-width:0}.chart b{display:block}
.chart{padding:14px 14px 8px;display:flex;flex-direction:column}
.chart svg:not(.swatch){width:100%;height:auto;display:block;margin-top:auto}
.keys{display:flex;flex-wrap:wrap;gap:0 18px;font-size:13px;color:var(--soft);
overflow-wrap:anywhere}
.keys em{font-style:normal;color:var(--ink);font-variant-numeric:tabular-nums}
.swatch{width:22px;height:8px;vertical-align:middle;margin-right:5px}
svg text{font-size:11.5px;fill:var(--soft);font-family:inherit}
.yt{text-anchor:end}.xt{text-anchor:middle}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.dashed{stroke-dasharray:6 4}.dot{fill:var(--c)}
.band{fill:var(--c);opacity:.2}
.grid{stroke:var(--grid)}.axis,.tick{stroke:var(--soft)}
.mark{stroke:var(--soft);stroke-dasharray:3 3}
.bad{stroke:var(--warn);stroke-width:2;fill:none}
.h rect{fill:transparent}.h path,.h text{visibility:hidden}
.h path{stroke:var(--soft)}.h text{fill:var(--ink)}
.h:hover path,.h:hover text{visibility:visible}
svg:hover .unit,svg:hover .marktext{visibility:hidden}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 14px;text-align:right;border-top:1px solid var(--line)}
thead th{border-top:0;color:var(--soft);font-weight:600;font-size:13px;vertical-align:bottom}
tbody tr:first-child>*{border-top:0}thead+tbody tr:first-child>*{border-top:1px solid var(--line)}
th:first-child{text-align:left}tbody th{font-weight:500}
.name{overflow-wrap:anywhere;min-width:110px;max-width:320px}
.scroll:has(>.results){width:fit-content;max-width:100%}.results th:first-child{padding-right:60px}
.classes td{width:17%;min-width:130px}
.best>*{font-weight:650}
.bar{background:linear-gradient(color-mix(in srgb,var(--c) 24%,transparent) 0 0)
left 8px center/calc((100% - 70px)*var(--share)/100%) 16px no-repeat}
.up{color:var(--good)}.down{color:var(--warn)}
.pairs th{width:230px;color:var(--soft);vertical-align:top}
.pairs td{text-align:left;overflow-wrap:anywhere}
details{margin:14px 0}summary{cursor:pointer;font-weight:600;margin-bottom:8px}
pre{margin:0;padding:14px;overflow-x:auto;font:12.5px/1.45 ui-monospace,Menlo,Consolas,monospace}
.gallery{display:grid;gap:16px}
.gallery figcaption{padding:12px 14px 8px;font-weight:600}
.gallery div{overflow-x:auto;padding:0 14px 14px}
.gallery img{display:block;width:100%;height:auto;min-width:560px;max-width:100vw;background:#fff;
border-radius:4px}
.say{color:var(--soft)}
footer{color:var(--soft);font-size:13px;padding-top:26px;padding-bottom:30px}
@media (max-width:600px){main,header,footer{padding-left:12px;padding-right:12px}
th,td{padding:6px 7px;font-size:14px}thead th{font-size:12px}.pairs th{width:38%}h1{font-size:22px}
.results th:first-child{padding-right:12px}.chart{padding:12px 8px 6px}
.bar{background:none}.classes td{width:auto;min-width:0}.name{min-width:96px}
svg text{font-size:13.5px}.h text{font-size:11.5px}}
@media print{.chart,figure,tr{break-inside:avoid}body{background:#fff}}
"""
