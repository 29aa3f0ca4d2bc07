"""Listing pages as sites write them, cut down to a few entries."""

ATOM = """<?xml version="1.0" encoding="UTF-8"?>
<feed xmlns="http://www.w3.org/2005/Atom">
  <title type="html">ArXiv Query</title>
  <entry>
    <id>http://arxiv.org/abs/2601.00001v2</id>
    <published>2026-01-02T18:00:00Z</published>
    <updated>2026-01-09T18:00:00Z</updated>
    <title>Tilted Rewards
      for Language Models</title>
    <summary>  We tilt rewards &amp; measure
      the entropy. </summary>
    <author><name>Ada Lovelace</name></author>
    <author><name>Alan Turing</name></author>
    <arxiv:comment xmlns:arxiv="http://arxiv.org/schemas/atom">12 pages</arxiv:comment>
    <link href="http://arxiv.org/abs/2601.00001v2" rel="alternate" type="text/html"/>
    <link title="pdf" href="http://arxiv.org/pdf/2601.00001v2" rel="related" type="application/pdf"/>
  </entry>
  <entry>
    <id>http://arxiv.org/abs/2601.00002v1</id>
    <title></title>
    <summary>Nobody named this.</summary>
  </entry>
</feed>
"""

LISTING = """<!DOCTYPE html>
<html><head><title>Machine Learning</title></head><body>
<h3>Showing new listings for Thursday, 8 January 2026</h3>
<dl id='articles'>
<dt><a name='item1'>[1]</a> <a href ="/abs/2601.03001" title="Abstract" id="2601.03001"> arXiv:2601.03001 </a>
 [<a href="/pdf/2601.03001" title="Download PDF">pdf</a>]</dt>
<dd><div class='meta'>
 <div class='list-title mathjax'><span class='descriptor'>Title:</span> Entropy at the Edge: $\\beta$ &lt; 1</div>
 <div class='list-authors'><a href="x">Grace Hopper</a>, <a href="y">Mary Shelley</a></div>
 <div class='list-comments mathjax'><span class='descriptor'>Comments:</span> 9 pages, ICML</div>
 <div class='list-subjects'><span class='descriptor'>Subjects:</span> Machine Learning (cs.LG)</div>
 <p class='mathjax'> We look at the edge. </p>
</div></dd>
<dt><a href ="/abs/2601.03002">arXiv:2601.03002</a></dt>
<dd><div class='meta'><div class='list-title'><span class='descriptor'>Title:</span></div>
 <p>An abstract that lost its title.</p></div></dd>
<h3>Fri, 9 Jan 2026 (showing 1 of 1 entries)</h3>
<dt><a href ="/abs/2601.03003">arXiv:2601.03003</a></dt>
<dd><div class='meta'><div class='list-title'><span class='descriptor'>Title:</span> The Entropy Mechanism of
 reinforcement learning for reasoning language models!</div></div></dd>
</dl></body></html>
"""

RESULTS = """<html><body><ol>
<li class="arxiv-result">
 <p class="list-title"><a href="https://arxiv.org/abs/2501.07001">arXiv:2501.07001</a></p>
 <p class="title is-5 mathjax">Mirror <span class="search-hit">Descent</span> Again</p>
 <p class="authors"><span>Authors:</span> <a href="a">Ada Lovelace</a>, <a href="b">Alan Turing</a></p>
 <p class="abstract mathjax"><span class="abstract-short">Short ... <a>More</a></span>
  <span class="abstract-full" style="display: none;">The whole abstract. <a class="fold">Less</a></span></p>
 <p class="is-size-7"><span>Submitted</span> 13 January, 2025; <span>originally announced</span> January 2025.</p>
 <p class="comments is-size-7"><span>Comments:</span> <span>3 figures</span></p>
</li></ol></body></html>
"""

PROPS = """<html><body><div class="SVELTE_HYDRATER" data-target="DailyPapers" data-props="{&quot;dailyPapers&quot;:[
{&quot;paper&quot;:{&quot;id&quot;:&quot;2602.00007&quot;,&quot;title&quot;:&quot;Agents &amp; Rewards&quot;,
&quot;summary&quot;:&quot;Agents\\nlearn.&quot;,&quot;publishedAt&quot;:&quot;2026-02-03T00:00:00.000Z&quot;,
&quot;authors&quot;:[{&quot;name&quot;:&quot;Ada Lovelace&quot;},
{&quot;name&quot;:&quot;A Ghost&quot;,&quot;hidden&quot;:true}],
&quot;organization&quot;:{&quot;name&quot;:&quot;analytical&quot;,&quot;fullname&quot;:&quot;Analytical Engines&quot;}},
&quot;numComments&quot;:4,&quot;title&quot;:&quot;Agents &amp; Rewards&quot;}]}"></div></body></html>
"""

CARDS = """<html><body><main>
<article class="relative"><div><a href="/papers/2602.00011"><img src="x.png"></a>
 <h3><a href="/papers/2602.00011" class="line-clamp-3">Cards Without Data</a></h3>
 <div><ul><li title="ada"></li></ul><a href="/papers/2602.00011">· 8 authors</a></div>
 <a href="/papers/2602.00011#community">2</a><time datetime="2026-02-05T10:00:00">Feb 5</time></div></article>
<article><a href="/papers/2602.00012"><img src="y.png"></a><h3></h3></article>
</main></body></html>
"""

LINKS = """<ul>
<li><b>Rewards in the Wild</b> (2025-11-04) <a href="https://arxiv.org/pdf/2511.02001">[PDF]</a> <a
 href="https://github.com/x/y">code</a>
<li><a href="https://openreview.net/forum?id=Abc123">Open Reviews of Policy Gradients</a>, 5 Nov 2025
<li><a href="https://arxiv.org/abs/2511.02003">pdf</a>
<li><a href="https://example.org/about">About this list of ours</a>
</ul>
"""

ONE = """<html><head><meta name="citation_title" content="One Paper Alone"/>
<meta name="citation_author" content="Lovelace, Ada"/><meta name="citation_author" content="Alan Turing"/>
<meta name="citation_date" content="2025/04/09"/><meta name="citation_arxiv_id" content="2504.00042"/>
<meta name="citation_abstract" content="Alone it stands."/></head><body><h1>One Paper Alone</h1></body></html>
"""

MAIL = r"""
------------------------------------------------------------------------------
\\
arXiv:2601.05001
Date: Mon, 5 Jan 2026 17:59:59 GMT   (812kb)

Title: Mirror Prox for
  Preferences
Authors: Ada Lovelace (1), Alan Turing and Grace Hopper ((1) London)
Categories: cs.LG
Comments: 20 pages
\\
  We use mirror prox
to reach an equilibrium.
\\ ( https://arxiv.org/abs/2601.05001 ,  812kb)
------------------------------------------------------------------------------
\\
arXiv:2601.05002
Date: soon
Title: A Second One Here
\\
  Short.
\\ ( https://arxiv.org/abs/2601.05002 ,  1kb)
"""

FIELDS = """Title: Rewards by Mail
Authors: Ada Lovelace, Alan Turing
Date: 2026-02-01
Abstract: A text of
two lines.
Comments: 3
Link: https://arxiv.org/abs/2602.09001

Title: No Date Here
Link: javascript:alert(1)

Title:
Abstract: Lost its head.
"""

ITEMS = """# Reading list

- [Regularised Policies](https://arxiv.org/abs/2512.01001), 2025-12-01
2. "Flow Matching Twice", arXiv:2512.01002 (Dec 3, 2025)
* buy milk
"""

TABLE = 'n\tdate\tauthors\ttitle\tlinks\n1\t2026-01-15\t3\tA "Quoted" Title\thttps://a.org https://b.org\n2\t2026\n'
