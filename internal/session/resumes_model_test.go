// This file lets backends die, close, refuse and be left at random, and compares
// what arrived with what the route's replay promises. HOLDFAST_SEED repeats one
// run, HOLDFAST_RUNS sets how many there are.

package session

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

func TestRandomResumes(t *testing.T) {
	first, n := rand.Uint64N(1<<32), uint64(300)
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		var err error
		if first, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("HOLDFAST_SEED: %v", err)
		}
		n = 1
	}
	if s := os.Getenv("HOLDFAST_RUNS"); s != "" {
		n, _ = strconv.ParseUint(s, 10, 64)
	}
	ends, resumes, moves, backends := map[string]int{}, 0, 0, 0
	for seed := first; seed < first+n; seed++ {
		t.Run(fmt.Sprintf("HOLDFAST_SEED=%d", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := resumeAtRandom(t, rand.New(rand.NewPCG(seed, 5)))
				end := string(l.rec.Ending().Reason)
				if end == "" {
					end = "none"
				}
				ends[l.mode.String()+" "+end]++
				backends += len(l.used())
				for _, s := range l.asked() {
					if s.Move {
						moves++
					} else {
						resumes++
					}
				}
			})
		})
	}
	t.Logf("%d backends, %d searches after a loss, %d for a move; ends: %v", backends, resumes, moves, ends)
}

// trial is one random life over several backends.
type trial struct {
	*rig
	rng   *rand.Rand
	mode  replay.Mode
	trace []string

	messages []string // complete ones of the client
	open     string   // what there is of the next one
	begun    bool
	pings    []string
	named    int // what backends have sent
	inside   map[*peer]bool
	asked_   map[registry.Reason]bool
	ended    bool // the client has closed or gone
}

func (l *trial) note(format string, args ...any) {
	l.trace = append(l.trace, fmt.Sprintf("%8v ", time.Since(l.began))+fmt.Sprintf(format, args...))
}

func pick[T any](rng *rand.Rand, of ...T) T { return of[rng.IntN(len(of))] }

func resumeAtRandom(t *testing.T, rng *rand.Rand) *trial {
	l := &trial{rng: rng, mode: pick(rng, modes...), inside: map[*peer]bool{}, asked_: map[registry.Reason]bool{}}
	s := resuming(l.mode)
	s.ReplayBuffer = pick[int64](rng, 300, 4<<10, 64<<10, 5<<20, 5<<20)
	s.ReplayClose = rng.IntN(4) == 0
	s.ResumeTimeout = pick(rng, 0, 5*time.Second, 30*time.Second, 30*time.Second, 30*time.Second)
	l.mode = s.mode()
	s.ResumeLimit = pick(rng, 0, 3, 3)
	s.PingInterval = pick(rng, 0, time.Second, 30*time.Second, 30*time.Second)
	s.PingTimeout = pick(rng, 2*time.Second, 30*time.Second)
	s.WriteTimeout = pick(rng, 0, 30*time.Second)
	reg := registry.New()
	if rng.IntN(5) == 0 {
		reg.ReplayMemory.SetLimit(pick[int64](rng, 1000, 10_000))
	}
	with := setup{
		settings: s, buffer: pick(rng, 100, 4<<10, defaultBuffer), answers: rng.IntN(2) == 0,
		backend: l.manners(), others: pick(rng, nil, []string{"b:80"}, []string{"b:80", "c:80"}),
		blind: rng.IntN(8) == 0,
	}
	l.rig = startIn(t, reg, with)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%v, %+v\n%+v", l.mode, s, with)
			for _, line := range l.trace {
				t.Log(line)
			}
		}
	})
	l.always(dial{manners: l.manners()})
	for range 5 + rng.IntN(40) {
		l.step()
		if rng.IntN(3) > 0 {
			l.pass(l.pause())
		}
	}
	l.settle()
	l.check()
	return l
}

func (l *trial) pause() time.Duration {
	scale := pick(l.rng, time.Millisecond, 50*time.Millisecond, 300*time.Millisecond, 3*time.Second)
	return time.Duration(l.rng.Int64N(int64(2 * scale)))
}

func (l *trial) manners() (is manners) {
	if l.rng.IntN(5) == 0 {
		is.chunk, is.every = 1+l.rng.IntN(9000), time.Duration(l.rng.IntN(50))*time.Millisecond
	}
	is.mute, is.silent = l.rng.IntN(6) == 0, l.rng.IntN(6) == 0
	if l.rng.IntN(6) == 0 {
		is.dies, is.after = pick(l.rng, (*peer).exit, (*peer).crash), 1+l.rng.IntN(pick(l.rng, 50, 500, 50_000))
	}
	return is
}

// text is a text that no other message begins with.
func (l *trial) text(name string) string {
	size := pick(l.rng, 10, 10, 100, 100, 1000, 20_000, 100_000)
	s := []byte(name + ":")
	for range l.rng.IntN(size) {
		s = append(s, byte('a'+len(s)%26))
	}
	return string(s)
}

func (l *trial) step() {
	b := l.latest()
	switch n := l.rng.IntN(100); {
	case n < 35:
		l.speak()
	case n < 42:
		ping := fmt.Sprintf("ping %d", len(l.pings))
		l.pings = append(l.pings, ping)
		l.note("client pings %q", ping)
		l.client.send(l.client.frame(true, 0, ws.OpPing, []byte(ping)))
	case n < 44:
		l.client.send(l.client.frame(true, 0, ws.OpPong, []byte("unasked")))
	case n < 55:
		l.answer(b)
	case n < 57:
		l.note("backend pings")
		b.send(b.frame(true, 0, ws.OpPing, []byte("of a backend")))
	case n < 61:
		l.note("backend exits")
		b.exit()
	case n < 64:
		l.note("backend crashes")
		b.crash()
	case n < 66:
		l.note("backend sends a FIN")
		b.sendFIN()
	case n < 70:
		more, how := l.rng.IntN(pick(l.rng, 30, 3000, 50_000)), pick(l.rng, "exits", "crashes")
		l.note("backend %s after %d bytes more", how, more)
		b.behave(func(is *manners) { is.dies, is.after = deaths[how], len(b.raw)+1+more })
	case n < 75:
		code := pick[uint16](l.rng, 1001, 1012, 1012, 1013)
		l.note("backend closes, %d", code)
		l.asked_[registry.BackendClosed] = l.asked_[registry.BackendClosed] || l.Settings().ResumeTimeout == 0
		b.sendClose(code, "")
	case n < 76:
		l.note("backend closes, 1000")
		l.asked_[registry.BackendClosed] = true
		b.sendClose(1000, "")
	case n < 81:
		l.note("a move: %v", l.rec.Move())
	case n < 82:
		at := l.pause()
		l.note("a move in %v", at)
		l.rec.MoveAt(time.Now().Add(at))
	case n < 88:
		for range 1 + l.rng.IntN(4) {
			l.dials()
		}
	case n < 92:
		p := pick(l.rng, b, l.client)
		l.note("stall, client %v", p == l.client)
		p.stall()
	case n < 97:
		l.note("resume")
		b.resume()
		l.client.resume()
	case n < 98:
		l.end()
	default:
		l.note("a long time")
		l.pass(10 * time.Second)
	}
}

// dials scripts a dial.
func (l *trial) dials() {
	d := dial{after: l.pause(), manners: l.manners()}
	switch n := l.rng.IntN(40); {
	case n < 15:
		d.is = fails
	case n < 16:
		d.is = refuses
		l.asked_[registry.Refused] = true
	case n < 17:
		d.is = none
		l.asked_[registry.BackendLost] = true
	case n < 30:
		l.named++
		name := fmt.Sprintf("n%d", l.named)
		d.early = func(p *peer) []byte { return p.sendEarly([][]byte{p.text(name)}, nil) }
	}
	l.note("a dial: %d after %v, %+v", d.is, d.after, d.manners)
	l.then(d)
}

// speak sends a message of the client, or a part of one.
func (l *trial) speak() {
	if l.ended {
		return
	}
	op, begins := ws.OpText, fmt.Sprintf("c%d", len(l.messages))
	if l.begun {
		op, begins = ws.OpContinuation, ""
	}
	text := l.text(begins)
	fin := l.rng.IntN(4) > 0
	l.open += text
	l.begun = !fin
	l.note("client speaks, %d bytes, fin %v", len(text), fin)
	wire := l.client.frame(fin, 0, op, []byte(text))
	if fin {
		l.messages, l.open = append(l.messages, l.open), ""
	}
	if l.rng.IntN(2) == 0 {
		l.client.send(wire)
		return
	}
	l.client.sendInPieces(wire, 1+len(wire)/(1+l.rng.IntN(6)), time.Duration(l.rng.IntN(300))*time.Millisecond)
}

// answer sends a message of a backend, or a part of one.
func (l *trial) answer(b *peer) {
	op := ws.OpText
	if l.inside[b] {
		op = ws.OpContinuation
	}
	fin := l.rng.IntN(4) > 0
	l.inside[b] = !fin
	l.named++
	text := l.text(fmt.Sprintf("b%d", l.named))
	l.note("backend speaks, %d bytes, fin %v", len(text), fin)
	wire := b.frame(fin, 0, op, []byte(text))
	if l.rng.IntN(2) == 0 {
		b.send(wire)
		return
	}
	b.sendInPieces(wire, 1+len(wire)/(1+l.rng.IntN(6)), time.Duration(l.rng.IntN(300))*time.Millisecond)
}

// end lets the client end.
func (l *trial) end() {
	if l.ended {
		return
	}
	l.ended = true
	switch l.rng.IntN(3) {
	case 0:
		l.note("client closes")
		l.asked_[registry.ClientClosed] = true
		l.client.sendClose(1000, "")
	case 1:
		l.note("client sends a FIN")
		l.asked_[registry.ClientGone] = true
		l.client.sendFIN()
	default:
		l.note("client resets")
		l.asked_[registry.ClientGone] = true
		l.client.conn.Reset()
	}
}

// settle brings the session to rest, with a backend that lives.
func (l *trial) settle() {
	l.note("settle")
	l.mu.Lock()
	l.script = nil
	l.otherwise = dial{}
	l.mu.Unlock()
	if l.begun && !l.ended {
		l.client.send(l.client.frame(true, 0, ws.OpContinuation, []byte("end")))
		l.messages = append(l.messages, l.open+"end")
	}
	mild := func(p *peer) {
		p.behave(func(is *manners) { is.stalled, is.every, is.dies = false, 0, nil })
	}
	mild(l.client)
	for range 200 {
		l.mu.Lock()
		all := slices.Clone(l.backends)
		l.mu.Unlock()
		for _, p := range all {
			mild(p)
		}
		l.pass(time.Second)
		l.client.mu.Lock()
		busy := len(l.client.queue) > 0
		l.client.mu.Unlock()
		if s := l.rec.State(); s == registry.Closed || s == registry.Open && !busy {
			break
		}
	}
	for range 60 {
		l.pass(2 * time.Second)
		mild(l.latest())
	}
}

func (l *trial) check() {
	l.t.Helper()
	switch s := l.rec.State(); s {
	case registry.Held, registry.Migrating, registry.Closing:
		l.t.Errorf("got the session %v after two minutes with a backend that lives, want it to go on or to be closed", s)
	default:
	}
	l.wantKept(promise{mode: l.mode, sent: l.messages})
	l.wantPassed()
	last := l.used()[len(l.used())-1]
	last.mu.Lock()
	mute := last.is.mute
	last.mu.Unlock()
	wantPonged(l.t, l.client, l.pings, l.live() && !mute && !l.ended)
	l.client.farewell(l.t)
	for _, p := range l.used() {
		p.farewell(l.t)
	}
	set := l.Settings()
	end := l.rec.Ending().Reason
	ok := l.asked_[end]
	switch end {
	case "":
		ok = true
	case registry.InDoubt:
		// Under unacked it is what was streamed; with resume off, what a move left.
		ok = l.mode == replay.Strict || l.mode == replay.Unacked || set.ResumeTimeout == 0
	case registry.Torn, registry.ResumeTimeout:
		ok = true
	case registry.Poison:
		ok = set.ResumeLimit > 0 && len(l.used()) >= set.ResumeLimit
	case registry.Overflow:
		ok = set.ReplayClose
	case registry.BackendLost:
		ok = ok || set.ResumeTimeout == 0
	case registry.WriteTimeout:
		ok = set.WriteTimeout > 0
	case registry.PingTimeout:
		ok = set.PingInterval > 0
	default: // somebody has to have asked for it
	}
	if !ok {
		l.t.Errorf("got the end (%s), for which there was no reason", end)
	}
}
