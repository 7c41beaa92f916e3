// What the settings of a Caddyfile do to a tunnel, in fake time.
package holdfast_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	holdfast "github.com/holdfast-proxy/caddy-holdfast"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/tunnel"
)

const day = 24 * time.Hour

// A tunnel without traffic is warned of once, and ends a grace later, or up to 10 % of
// the grace after that.
func TestConfiguredInactivity(t *testing.T) {
	for words, want := range map[string]struct{ limit, grace time.Duration }{
		"":                              {24 * time.Hour, 10 * time.Minute},
		"inactivity_multiplier 10":      {40 * time.Hour, 10 * time.Minute},
		"inactivity_multiplier 1.5":     {6 * time.Hour, 10 * time.Minute},
		"inactivity_timeout 1h":         {6 * time.Hour, 10 * time.Minute},
		"keep_alive_treatment extended": {24 * time.Hour, 10 * time.Minute},
		"keep_alive_treatment standard": {4 * time.Hour, 10 * time.Minute},
		"keep_alive_treatment standard\ninactivity_multiplier 10":                        {4 * time.Hour, 10 * time.Minute},
		"keep_alive_treatment standard\ninactivity_timeout 90m\ninactivity_grace 5m":     {90 * time.Minute, 5 * time.Minute},
		"inactivity_timeout 1m\ninactivity_multiplier 1\ninactivity_grace 0\nname quick": {time.Minute, 0},
	} {
		inTime(t, words, func(w *timedTunnel) {
			w.pass(want.limit - time.Second)
			w.wantLive()
			w.wantWarnings(0)
			w.pass(time.Second)
			w.wantWarnings(1)
			if got := time.Duration(w.idle.Load()); got != want.limit {
				t.Errorf("%q: got a warning after %v without a byte, want %v", words, got, want.limit)
			}
			if want.grace > 0 {
				w.pass(want.grace - time.Second)
				w.wantLive()
			}
			w.pass(want.grace/10 + time.Second)
			w.wantEnd(registry.Idle)
			w.wantWarnings(1)
		})
	}
}

// Bytes begin the time anew, whoever sends them, also when it was warned already.
func TestConfiguredInactivityWithTraffic(t *testing.T) {
	for _, send := range []func(*timedTunnel){
		func(w *timedTunnel) { w.send(w.client, w.backend, "x") },
		func(w *timedTunnel) { w.send(w.backend, w.client, "x") },
	} {
		inTime(t, "inactivity_multiplier 10", func(w *timedTunnel) {
			w.pass(40*time.Hour - time.Minute)
			send(w)
			w.pass(40*time.Hour - time.Second)
			w.wantWarnings(0)
			w.pass(5 * time.Minute)
			w.wantWarnings(1)
			send(w)
			w.pass(40*time.Hour - time.Second)
			w.wantLive()
			w.wantWarnings(1)
			w.pass(11*time.Minute + time.Second)
			w.wantWarnings(2)
			w.wantEnd(registry.Idle)
		})
	}
}

// An immortal tunnel has no limits but those of its peers, whatever else is said.
func TestConfiguredImmortality(t *testing.T) {
	for _, words := range []string{
		"keep_alive_treatment immortal",
		"keep_alive_treatment immortal\nmax_lifetime off",
		"keep_alive_treatment immortal\nmax_lifetime 1h\ninactivity_timeout 1m\ninactivity_grace 0",
	} {
		inTime(t, words, func(w *timedTunnel) {
			w.pass(365 * day)
			w.wantLive()
			w.wantWarnings(0)
			w.send(w.client, w.backend, "still")
			w.send(w.backend, w.client, "there")
			w.client.end()
			w.backend.end()
			w.wantEnd(registry.EOF)
		})
	}
}

// A lifetime is shortened by up to 10 %, and not prolonged by traffic.
func TestConfiguredLifetime(t *testing.T) {
	for words, limit := range map[string]time.Duration{
		"":                              168 * time.Hour,
		"keep_alive_treatment standard": 24 * time.Hour,
		"max_lifetime 10h":              10 * time.Hour,
		"keep_alive_treatment standard\nmax_lifetime 20h": 20 * time.Hour,
		"max_lifetime off": 0,
		"keep_alive_treatment standard\nmax_lifetime off": 0,
	} {
		inTime(t, words, func(w *timedTunnel) {
			end := limit - limit/10
			if limit == 0 {
				end = 365 * day
			}
			for ; w.age() < end-time.Hour; w.pass(time.Hour) {
				w.send(w.backend, w.client, "x")
			}
			w.pass(end - w.age() - time.Second)
			w.wantLive()
			if limit > 0 {
				w.pass(limit - w.age())
				w.wantEnd(registry.Lifetime)
			}
		})
	}
}

// A client that only sends is not cut, unless it is configured.
func TestConfiguredStuckTimeout(t *testing.T) {
	inTime(t, "max_lifetime off", func(w *timedTunnel) {
		for range 100 {
			w.send(w.client, w.backend, "news")
			w.pass(23 * time.Hour)
		}
		w.wantLive()
		w.wantWarnings(0)
	})
	inTime(t, "stuck_timeout 90s", func(w *timedTunnel) {
		w.pass(time.Hour)
		w.send(w.client, w.backend, "question")
		w.pass(89 * time.Second)
		w.send(w.backend, w.client, "answer")
		w.pass(time.Hour)
		w.wantLive()
		w.send(w.client, w.backend, "question")
		w.pass(89 * time.Second)
		w.send(w.client, w.backend, "again")
		w.wantLive()
		w.pass(time.Second)
		w.wantEnd(registry.Stuck)
	})
}

// One side ends after six minutes. What the other one has to say still arrives, for as
// long as is configured, counted from that end.
func TestConfiguredHalfOpenTimeout(t *testing.T) {
	for words, limit := range map[string]time.Duration{
		"":                              5 * time.Minute,
		"keep_alive_treatment standard": 5 * time.Minute,
		"keep_alive_treatment immortal": 5 * time.Minute,
		"half_open_timeout 30s":         30 * time.Second,
		"half_open_timeout 3h":          3 * time.Hour,
	} {
		for side := range 2 {
			inTime(t, words, func(w *timedTunnel) {
				first, last := w.client, w.backend
				if side == 1 {
					first, last = last, first
				}
				w.pass(6 * time.Minute)
				first.end()
				for range 4 {
					w.pass(limit / 4)
					if w.age() < 6*time.Minute+limit {
						w.send(last, first, "data")
						w.wantLive()
					}
				}
				w.wantEnd(registry.HalfOpenTimeout)
			})
		}
	}
	inTime(t, "", func(w *timedTunnel) {
		w.pass(6 * time.Minute)
		w.client.end()
		w.pass(4 * time.Minute)
		w.wantLive()
		w.send(w.backend, w.client, "all that you wanted")
		w.backend.end()
		w.wantEnd(registry.EOF)
	})
}

// timedTunnel is a tunnel of a handler that has some subdirectives.
type timedTunnel struct {
	t               *testing.T
	set             *tunnel.Settings
	rec             *registry.Conn
	client, backend *farEnd
	began           time.Time
	warnings        atomic.Int32
	idle            atomic.Int64 // that the last warning told
}

// inTime runs a tunnel of a handler that has some subdirectives in a bubble of fake
// time, in which nothing of it is left afterwards.
func inTime(t *testing.T, words string, test func(*timedTunnel)) {
	t.Helper()
	set := tunnelSettings(t, words)
	t.Run(words, func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			nearClient, client := newFarEnd()
			nearBackend, backend := newFarEnd()
			w := &timedTunnel{t: t, set: set, client: client, backend: backend, began: time.Now()}
			reg := registry.New()
			var err error
			w.rec, err = reg.Admit(reg.Retain(registry.Passthrough, "words"), registry.Info{Kind: registry.Passthrough}, unborn{})
			if err != nil || !w.rec.Open("") {
				t.Fatalf("the tunnel does not open: %v", err)
			}
			tun := tunnel.New(w.rec, w, nearClient, nearBackend, nil)
			w.rec.Handover(tun)
			var all sync.WaitGroup
			for _, run := range []func(){tun.Run, client.read, backend.read} {
				all.Go(run)
			}
			synctest.Wait()
			test(w)
			w.rec.Close(registry.Ending{Reason: registry.Admin})
			client.conn.Close()
			backend.conn.Close()
			all.Wait()
			if n := reg.Len(); n != 0 {
				t.Errorf("got %d records in the registry afterwards, want none", n)
			}
		})
	})
}

// tunnelSettings is what a tunnel is told by a handler that has some subdirectives.
func tunnelSettings(t *testing.T, words string) *tunnel.Settings {
	t.Helper()
	adapted, err := adapt(fmt.Sprintf(blocks["sni_passthrough"], words))
	if err != nil {
		t.Fatal(err)
	}
	var config struct {
		Apps struct {
			Layer4 struct {
				Servers map[string]struct {
					Routes []struct{ Handle []holdfast.SNIPassthrough }
				}
			}
		}
	}
	if err := json.Unmarshal([]byte(adapted), &config); err != nil {
		t.Fatal(err)
	}
	for _, server := range config.Apps.Layer4.Servers {
		set, err := server.Routes[0].Handle[0].KeepAlive.Tunnel()
		if err != nil {
			t.Fatal(err)
		}
		return set
	}
	t.Fatalf("no server in %s", adapted)
	return nil
}

// Settings implements tunnel.Route.
func (w *timedTunnel) Settings() *tunnel.Settings { return w.set }

// Inactive implements tunnel.Route.
func (w *timedTunnel) Inactive(_ *registry.Conn, idle time.Duration) {
	w.warnings.Add(1)
	w.idle.Store(int64(idle))
}

// pass lets time pass, and everything that happens meanwhile.
func (w *timedTunnel) pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (w *timedTunnel) age() time.Duration { return time.Since(w.began) }

// send sends a text from one end and wants it to arrive at the other.
func (w *timedTunnel) send(from, to *farEnd, text string) {
	w.t.Helper()
	before := to.text()
	if _, err := from.conn.Write([]byte(text)); err != nil {
		w.t.Fatalf("sending after %v: %v", w.age(), err)
	}
	synctest.Wait()
	if got := to.text(); got != before+text {
		w.t.Fatalf("after %v: got %q, want %q after it was %q", w.age(), got, before+text, before)
	}
}

func (w *timedTunnel) wantLive() {
	w.t.Helper()
	if why := w.rec.Ending().Reason; why != "" {
		w.t.Fatalf("after %v: got it ended (%s), want it alive", w.age(), why)
	}
}

func (w *timedTunnel) wantEnd(want registry.Reason) {
	w.t.Helper()
	synctest.Wait()
	if got := w.rec.Ending().Reason; got != want {
		w.t.Errorf("after %v: got reason %q, want %q", w.age(), got, want)
	}
}

func (w *timedTunnel) wantWarnings(want int32) {
	w.t.Helper()
	if got := w.warnings.Load(); got != want {
		w.t.Errorf("after %v: got %d warnings, want %d", w.age(), got, want)
	}
}

// farEnd is a peer of a tunnel.
type farEnd struct {
	conn *twoWay
	mu   sync.Mutex
	got  []byte
}

func newFarEnd() (near *twoWay, far *farEnd) {
	toFar, fromNear := net.Pipe()
	toNear, fromFar := net.Pipe()
	return &twoWay{toNear, fromNear}, &farEnd{conn: &twoWay{toFar, fromFar}}
}

// read owns reading; it ends with what there is to read.
func (f *farEnd) read() {
	b := make([]byte, 100)
	for {
		n, err := f.conn.Read(b)
		f.mu.Lock()
		f.got = append(f.got, b[:n]...)
		f.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (f *farEnd) text() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return string(f.got)
}

// end sends no more.
func (f *farEnd) end() { _ = f.conn.CloseWrite() }

// twoWay is a connection that can be ended one way: a pipe for each. Its net.Conn is
// the one that is read.
type twoWay struct {
	net.Conn
	out net.Conn
}

func (c *twoWay) Write(b []byte) (int, error)   { return c.out.Write(b) }
func (c *twoWay) CloseWrite() error             { return c.out.Close() }
func (c *twoWay) Close() error                  { return errors.Join(c.out.Close(), c.Conn.Close()) }
func (c *twoWay) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// unborn is the owner of a record before there is a tunnel.
type unborn struct{}

func (unborn) End(registry.Ending) {}
func (unborn) Abort()              {}
func (unborn) Reconsider()         {}
func (unborn) Move() error         { return errors.ErrUnsupported }

// Interface guards
var (
	_ tunnel.Route   = (*timedTunnel)(nil)
	_ registry.Owner = unborn{}
)
