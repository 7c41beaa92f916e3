// This file changes the backend under clients to which messages come compressed.

package e2e

import (
	"bytes"
	"compress/flate"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// compressors are kinds of backends that agree to compression on terms of their own.
var compressors = []struct {
	kind  string
	flags []string
}{
	{"coder", []string{"-compress"}},   // uses what it sent before
	{"gorilla", []string{"-compress"}}, // answers server_no_context_takeover
	{"node", []string{"-compress", "true"}},
	{"node", []string{"-compress", "true", "-window-bits", "9"}},
	{"node", []string{"-compress", "true", "-window-bits", "15"}},
	{"coder", []string{"-compress", "-window-bits", "10"}},
}

// Clients that nobody here wrote stay connected, and can read what comes, over ten
// changes of the backend, each of another kind than the one before.
func TestCompressionOverTenBackends(t *testing.T) {
	for _, g := range []struct {
		name  string
		start func(t testing.TB) guest
	}{
		{"ws", func(t testing.TB) guest { return wsGuest{nodeGuest{startNode(t, "ws_client.cjs")}} }},
		{"browser", func(t testing.TB) guest {
			return browserGuest{nodeGuest{startNode(t, "browser.cjs", tool(t, "chromium"))}}
		}},
	} {
		t.Run(g.name, func(t *testing.T) {
			var backends []*backendProcess
			var addrs []string
			for i, c := range compressors {
				b := startBackend(t, c.kind, fmt.Sprint(c.kind, i), c.flags...)
				backends, addrs = append(backends, b), append(addrs, b.addr)
			}
			kill(t, backends...)
			client := g.start(t)
			p := startCaddy(t, "", "websocket_proxy "+strings.Join(addrs, " ")+" {\n resume_interval 1ms 50ms\n}\n\t"+page)
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			if err := client.visit(ctx, p); err != nil {
				t.Fatal(err)
			}
			// What the client is told depends on the first: server_no_context_takeover
			// or not.
			for _, first := range []int{1, 0, 3} {
				if !full && (first == 3 || first == 0 && g.name == "browser") {
					continue
				}
				t.Run(fmt.Sprint("first ", backends[first].name), func(t *testing.T) {
					testTenBackends(ctx, t, p, client, backends, first)
				})
			}
		})
	}
}

func testTenBackends(ctx context.Context, t *testing.T, p *proxy, client guest, backends []*backendProcess, first int) {
	now := backends[first]
	now.restart(t)
	o, err := client.open(ctx, target{URL: "ws://" + p.addr + "/chat?echo=1", Compress: true})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(o.Extensions, "permessage-deflate") {
		t.Fatalf("extensions: got %q, want permessage-deflate", o.Extensions)
	}
	came := make(map[message]bool)
	talk := func() {
		t.Helper()
		// Twice the same words: a server may use what it sent before.
		for _, m := range []content{{"text", 40_000, true}, {"text", 40_001, true}, {"binary", 3000, false}, {"text", 0, false}} {
			m.Size += len(came) // each is another one
			want := m.message()
			got, err := client.echo(ctx, m)
			for err == nil && got != want && came[got] { // replayed, and so echoed again
				got, err = client.next(ctx)
			}
			if err != nil || got != want {
				t.Fatalf("on %s: echo of %+v: got %+v, %v; want %+v", now.name, m, got, err, want)
			}
			came[want] = true
		}
	}
	talk()
	for n := range 10 {
		next := backends[(first+n+1)%len(backends)]
		if next == now {
			t.Fatal("the next backend is the same")
		}
		next.restart(t)
		if n%2 == 0 {
			kill(t, now)
		} else {
			term(t, now)
		}
		now = next
		talk()
		list := p.connections(t)
		if len(list) != 1 || list[0].Upstream != now.addr || list[0].State != "open" {
			t.Errorf("connections: got %+v, want one at %s", list, now.addr)
		}
	}
	if got, err := client.close(ctx, ending{Code: 1000}); err != nil || got != (ending{Code: 1000, Clean: true}) {
		t.Errorf("close: got %+v, %v", got, err)
	}
	kill(t, now)
	p.waitEmpty(t)
}

// A client that limits the window stays with backends that keep to its limit; others
// get no message.
func TestWindowLimitOverBackends(t *testing.T) {
	first := startBackend(t, "node", "first", "-compress", "true", "-window-bits", "9")
	next := startBackend(t, "node", "next", "-compress", "true", "-window-bits", "10")
	unfit := []*backendProcess{
		startBackend(t, "gorilla", "gorilla", "-compress"),                   // answers without a limit
		startBackend(t, "coder", "coder", "-compress", "-window-bits", "15"), // declines, as it knows no limits
		startBackend(t, "node", "plain"),                                     // never compresses
	}
	client := wsGuest{nodeGuest{startNode(t, "ws_client.cjs")}}
	site := "websocket_proxy " + first.addr + " " + next.addr
	for _, b := range unfit {
		site += " " + b.addr
	}
	p := startCaddy(t, "", site+" {\n lb_policy round_robin\n resume_interval 1ms 20ms\n}")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	kill(t, append(unfit, next)...) // none of these is to be the first
	if _, err := called[opened](ctx, client.node, "open", map[string]any{
		"url": "ws://" + p.addr + "/?echo=1", "protocols": []string{}, "compress": map[string]any{"serverMaxWindowBits": 10},
	}); err != nil {
		t.Fatal(err)
	}
	for _, b := range unfit {
		b.restart(t)
	}
	fit := []*backendProcess{first, next}
	for n := range 6 {
		now, then := fit[n%2], fit[(n+1)%2]
		m := content{"text", 30_000 + n, true}
		want := m.message()
		got, err := client.echo(ctx, m)
		for err == nil && got != want && got.Size < want.Size {
			got, err = client.next(ctx)
		}
		if err != nil || got != want {
			t.Fatalf("echo %d: got %+v, %v; want %+v", n, got, err, want)
		}
		if n < 5 {
			then.restart(t)
			kill(t, now)
		}
	}
	asked := 0
	for _, b := range unfit {
		for _, r := range b.records(t) {
			switch r.Event {
			case "open":
				asked++
			case "text", "binary":
				t.Errorf("backend %s, which cannot take over, got a message of %d bytes", b.name, len(r.Text)+len(r.Binary))
			}
		}
	}
	t.Logf("%d times a backend was asked that does not keep to the limit", asked)
	if asked == 0 {
		t.Error("no backend was asked that does not keep to the limit")
	}
	if got, err := client.close(ctx, ending{Code: 1000}); err != nil || got != (ending{Code: 1000, Clean: true}) {
		t.Errorf("close: got %+v, %v", got, err)
	}
}

// deflated is a message as it is sent compressed, without context (RFC 7692 §7.2.1).
func deflated(t testing.TB, text string) string {
	t.Helper()
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, flate.BestSpeed)
	if err == nil {
		_, err = w.Write([]byte(text))
	}
	if err == nil {
		err = w.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(b.String(), "\x00\x00\xff\xff")
}

// extensions is the line of an answer, if it has one.
func extensions(answer string) []string {
	if answer == "" {
		return nil
	}
	return []string{"Sec-WebSocket-Extensions: " + answer + "\r\n"}
}

// A backend is offered what the client was told. If it answers with less, or with
// something else, it is no candidate: it gets no data, and the next one takes over.
func TestCompressionTermsAtRedial(t *testing.T) {
	const pmd = "permessage-deflate"
	const told = pmd + "; client_no_context_takeover"
	for _, tt := range []struct {
		name, offer, answer string // of the client, and of the first backend
		told                string
		unfit, fit          []string // answers of later ones
	}{
		{
			"no limits", pmd + "; client_max_window_bits", pmd, told,
			[]string{
				"", pmd + "; client_max_window_bits=12", pmd + ", " + pmd, "x-webkit-deflate-frame", pmd + "; server_max_window_bits=7",
				pmd + "; server_max_window_bits=16", told + "; client_no_context_takeover", pmd + "; unknown", pmd + "; server_max_window_bits", "not=a;header;;",
			},
			[]string{pmd, told, told + "; server_no_context_takeover", pmd + "; server_max_window_bits=9", pmd + "; server_max_window_bits=15"},
		},
		{
			"unasked window", pmd, pmd + "; server_max_window_bits=9", told,
			[]string{""},
			[]string{pmd, pmd + "; server_max_window_bits=12"},
		},
		{
			"window of the client", pmd + "; server_max_window_bits=10", pmd + "; server_max_window_bits=9", told + "; server_max_window_bits=10",
			[]string{"", pmd, told, pmd + "; server_max_window_bits=11", pmd + "; server_max_window_bits=15"},
			[]string{pmd + "; server_max_window_bits=10", pmd + "; server_max_window_bits=8", told + "; server_max_window_bits=9; server_no_context_takeover"},
		},
		{
			"no context, by the first backend", pmd, told + "; server_no_context_takeover", told + "; server_no_context_takeover",
			[]string{"", pmd, told, pmd + "; server_max_window_bits=9"},
			[]string{pmd + "; server_no_context_takeover", pmd + "; server_no_context_takeover; server_max_window_bits=12"},
		},
		{
			"no context, by the client", pmd + "; server_no_context_takeover; server_max_window_bits=12", pmd + "; server_max_window_bits=12; server_no_context_takeover",
			told + "; server_no_context_takeover; server_max_window_bits=12",
			[]string{"", pmd + "; server_no_context_takeover", pmd + "; server_max_window_bits=12", pmd + "; server_no_context_takeover; server_max_window_bits=13"},
			[]string{pmd + "; server_no_context_takeover; server_max_window_bits=11"},
		},
		{
			"declined by the first", pmd, "", "",
			[]string{pmd, told},
			[]string{""},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			answers := append(append([]string{}, tt.unfit...), tt.fit...)
			tried := make(chan string, len(answers))
			b := new(change)
			// Each that is fit is lost in its turn.
			b.first = func(c *rawConn) {
				_, _, _ = c.receive()
				c.reset()
			}
			b.next = func(n int, r *http.Request, c *rawConn) bool {
				if n > len(answers) {
					return c.accept(r, answerTo(r)...) == nil
				}
				answer := answers[n-1]
				tried <- answer
				_ = c.accept(r, extensions(answer)...)
				if n <= len(tt.unfit) {
					if rest, _ := io.ReadAll(c.br); len(rest) > 0 {
						t.Errorf("a backend that answered %q got %q", answer, rest)
					}
					return false
				}
				if h, _, err := c.receive(); err != nil || h.OpCode != ws.OpText {
					t.Errorf("a backend that answered %q got %v, %v; want the message", answer, h.OpCode, err)
				}
				c.reset()
				return false
			}
			b.requests = make(chan *http.Request, 100)
			serve := func(r *http.Request, c *rawConn) {
				if r.Header.Get("Holdfast-Resume") != "" {
					b.serve(r, c)
					return
				}
				b.requests <- r
				b.n.Add(1)
				if c.accept(r, extensions(tt.answer)...) == nil {
					b.first(c)
				}
			}
			p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n resume_interval 1ms 5ms\n resume_limit 0\n}", rawBackend(t, serve), rawBackend(t, serve)))
			res, c := rawRequest(t, p.addr, rawUpgrade(p.addr, "Sec-WebSocket-Extensions: "+tt.offer+"\r\n"))
			if got := res.Header.Get("Sec-WebSocket-Extensions"); res.StatusCode != 101 || got != tt.told {
				t.Fatalf("the client was answered %d %q, want %q", res.StatusCode, got, tt.told)
			}
			payload, first := deflated(t, "hold fast, hold fast, hold fast"), byte(fin|rsv1|text)
			if tt.told == "" {
				payload, first = "hold fast", fin|text
			}
			if _, err := c.Write(wireFrame(first, payload, true, 0)); err != nil {
				t.Fatal(err)
			}
			b.asked(t)
			for range len(answers) + 1 {
				if got := b.asked(t).Header.Get("Sec-WebSocket-Extensions"); got != tt.told {
					t.Errorf("offer at the re-dial: got %q, want what the client was told: %q", got, tt.told)
				}
			}
			h, got, err := c.receive()
			if err != nil || got != payload || h.OpCode != ws.OpText || h.Rsv1() != (tt.told != "") {
				t.Errorf("echo: got %+v %q, %v; want %q", h, got, err, payload)
			}
			for _, want := range answers {
				if got := <-tried; got != want {
					t.Errorf("answers tried: got %q, want %q", got, want)
				}
			}
			_, _ = c.Write(frame.AppendClose(nil, 1000, "", true))
			c.hears(t, "client", says{1000, ""})
		})
	}
}
