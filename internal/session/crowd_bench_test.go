// This file measures what messages suffer while somebody asks a registry with 100 000
// connections for something.

package session

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/holdfast-proxy/caddy-holdfast/internal/adminapi"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// BenchmarkEchoInACrowd lets 200 clients echo 10 times a second each, over TCP, in a
// process with 100 000 further connections. An iteration is half a second in peace and
// half a second in which something is asked of the registry: "paced", ten times a second
// or, of what is seldom done, once; or "always", by somebody who never pauses. p99-ratio is how much longer the slowest
// hundredth of the echoes take then, in the median of all iterations. What "spinning",
// which knows nothing of the registry, does to it is what any work on the same
// processors does.
//
//	go test -run '^$' -bench EchoInACrowd -benchtime 10x ./internal/session/
func BenchmarkEchoInACrowd(b *testing.B) {
	const half = 500 * time.Millisecond
	c := newCrowd(b)
	for _, ask := range c.questions(b) {
		for _, pause := range []time.Duration{ask.pause, 0} {
			pace := "always"
			if pause > 0 {
				pace = "paced"
			}
			b.Run(ask.name+"/"+pace, func(b *testing.B) {
				var peace, busy []time.Duration
				for b.Loop() {
					peace = append(peace, quantile(c.echoes(b, half), 0.99))
					stop := repeat(ask.do, pause)
					busy = append(busy, quantile(c.echoes(b, half), 0.99))
					stop()
				}
				before, during := quantile(peace, 0.5), quantile(busy, 0.5)
				b.ReportMetric(float64(during)/float64(before), "p99-ratio")
				b.ReportMetric(float64(before.Microseconds()), "p99-peace-µs")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

// crowd is a registry with many connections, of which a few are real.
type crowd struct {
	reg     *registry.Registry
	route   *registry.Route // of those that are not
	clients []*crowdClient
	message []byte
}

// crowdClient is a client with a socket.
type crowdClient struct {
	conn Conn
	r    *bufio.Reader
}

func newCrowd(b *testing.B) *crowd {
	c := &crowd{reg: registry.New(), message: ws.MustCompileFrame(ws.MaskFrameWith(ws.NewBinaryFrame(make([]byte, 64)), ws.NewMask()))}
	many := 1000
	c.reg.SetLimits(registry.Limits{PerIP: &many}, 0)
	c.route = c.reg.Retain(registry.WebSocket, "crowd")
	for i := range 100_000 {
		rec, err := c.reg.Admit(c.route, registry.Info{Kind: registry.WebSocket, Client: fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255), Protocol: "h1"}, opening{})
		if err != nil {
			b.Fatal(err)
		}
		up := fmt.Sprintf("app%d:80", i%10)
		rec.Attempt(c.route.Choose(func(func(string) registry.Load) string { return up }), up, time.Time{})
		rec.Open("")
	}
	answer := ws.MustCompileFrame(ws.NewBinaryFrame(make([]byte, 64)))
	for range 200 {
		nearClient, client := newTCPPair(b)
		nearBackend, backend := newTCPPair(b)
		done := runSessionIn(b, c.reg, nearClient, nearBackend)
		b.Cleanup(func() { _, _ = client.Close(), backend.Close(); <-done })
		go echoMessages(backend, answer)
		c.clients = append(c.clients, &crowdClient{client, bufio.NewReader(client)})
	}
	return c
}

// echoMessages owns a backend: it gives each message the same answer, until its
// connection ends.
func echoMessages(backend Conn, answer []byte) {
	r := bufio.NewReader(backend)
	for skipMessage(r) == nil {
		if _, err := backend.Write(answer); err != nil {
			return
		}
	}
}

// echoes lets all clients talk for a while and returns how long each echo took.
func (c *crowd) echoes(b *testing.B, lasting time.Duration) (all []time.Duration) {
	const pause = 100 * time.Millisecond
	var mu sync.Mutex // guards all
	var each sync.WaitGroup
	began := time.Now()
	for i, client := range c.clients {
		each.Go(func() {
			var took []time.Duration
			for next := pause * time.Duration(i) / time.Duration(len(c.clients)); next < lasting; next += pause {
				time.Sleep(time.Until(began.Add(next)))
				sent := time.Now()
				if _, err := client.conn.Write(c.message); err != nil {
					b.Error(err)
					return
				}
				if err := skipMessage(client.r); err != nil {
					b.Error(err)
					return
				}
				took = append(took, time.Since(sent))
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, took...)
		})
	}
	each.Wait()
	return all
}

// question is what may be asked of a registry.
type question struct {
	name  string
	pause time.Duration // as somebody has it who asks often
	do    func()
}

func (c *crowd) questions(b *testing.B) []question {
	mux := http.NewServeMux()
	for _, route := range adminapi.Routes(c.reg, nil) {
		mux.HandleFunc(route.Pattern, func(w http.ResponseWriter, r *http.Request) { _ = route.Handler.ServeHTTP(w, r) })
	}
	metrics := prometheus.NewPedanticRegistry()
	for _, m := range c.reg.Collectors() {
		metrics.MustRegister(m)
	}
	mux.Handle("/metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	server := httptest.NewServer(mux)
	b.Cleanup(server.Close)
	get := func(target string) func() {
		return func() {
			res, err := server.Client().Get(server.URL + target)
			if err != nil {
				b.Error(err)
				return
			}
			defer res.Body.Close()
			if _, err := io.Copy(io.Discard, res.Body); err != nil || res.StatusCode != http.StatusOK {
				b.Errorf("%s: got status %d, %v", target, res.StatusCode, err)
			}
		}
	}
	var pages []string // the ids to go on after
	for after := ""; ; {
		if _, after = c.reg.List(registry.Filter{}, 1000, after); after == "" {
			break
		}
		pages = append(pages, after)
	}
	const often, seldom = 100 * time.Millisecond, time.Second
	return []question{
		{"spinning", often, func() { spin(10 * time.Millisecond) }},
		{"first page", often, get("/connections")},
		{"middle page", often, get("/connections?after=" + pages[len(pages)/2])},
		{"last page", often, get("/connections?after=" + pages[len(pages)-1])},
		{"largest page", often, get("/connections?limit=1000")},
		{"page of none", often, get("/connections?client=192.0.2.1")},
		{"stats", often, get("/connections/stats")},
		{"metrics", often, get("/metrics")},
		{"20 limits per IP", often, c.visit},
		{"sweep", seldom, c.reg.Sweep},
		{"end planned", seldom, func() {
			c.reg.EndSelected(registry.Filter{Route: "crowd"}, time.Hour, registry.Ending{Reason: registry.Admin})
		}},
		{"drain planned", seldom, func() { c.reg.MovePaced(c.route, func(up string) bool { return up < "app5:80" }, time.Hour) }},
		{"drain lifted", seldom, func() { c.reg.MovePaced(c.route, func(string) bool { return false }, time.Hour) }},
	}
}

// visit lets clients come and go: more would not come through a socket meanwhile.
func (c *crowd) visit() {
	time.Sleep(time.Millisecond)
	for range 20 {
		if rec, err := c.reg.Admit(c.route, registry.Info{Kind: registry.WebSocket, Client: "10.0.0.1"}, opening{}); err == nil {
			rec.Done()
		}
	}
}

// spin works for a while.
func spin(lasting time.Duration) {
	for began := time.Now(); time.Since(began) < lasting; {
	}
}

// repeat does something again and again until it is stopped.
func repeat(do func(), pause time.Duration) (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			do()
			select {
			case <-quit:
				return
			case <-time.After(pause):
			}
		}
	}()
	return func() { close(quit); <-done }
}

// quantile returns the value that a share q of all does not exceed.
func quantile(all []time.Duration, q float64) time.Duration {
	slices.Sort(all)
	return all[int(q*float64(len(all)-1))]
}
