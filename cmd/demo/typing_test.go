//go:build unix

package main

import (
	"context"
	"encoding/json"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// Lines that are on their way when a backend says goodbye, or is killed, are
// answered by the next one.
func TestRestartLosesNoLine(t *testing.T) {
	d := startDemo(t, testBinary(t), "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var typists []*typist
	for range 20 {
		p := &typist{conn: dial(t, d.url[len("http://"):], nil), stop: make(chan struct{}), answered: make(map[int]bool)}
		typists = append(typists, p)
		running.Go(func() { p.typeOn(ctx, t) })
		running.Go(func() { p.listen(ctx, t) })
	}
	// After the first one, everybody talks to the one that is next.
	for _, restart := range []string{"alder?how=stop", "birch?how=stop", "alder?how=kill"} {
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, d.url+"/restart/"+restart, nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if got, want := response.StatusCode, http.StatusNoContent; got != want {
			t.Fatalf("%s: got status %d, want %d", restart, got, want)
		}
	}
	for _, p := range typists {
		close(p.stop)
	}
	running.Wait()

	sent, lost, repeats, greetings := 0, 0, 0, 0
	for _, p := range typists {
		sent += p.sent
		lost += p.sent - len(p.answered)
		repeats += p.repeats
		greetings += p.greetings
	}
	t.Logf("%d lines, %d repeats, %d greetings", sent, repeats, greetings)
	if lost > 0 {
		t.Errorf("%d of %d lines were never answered", lost, sent)
	}
	if want := 3 * len(typists); greetings < want {
		t.Errorf("got %d greetings, want %d at least", greetings, want)
	}
}

// typist sends numbered lines as fast as nobody types, and hears the answers.
type typist struct {
	conn *websocket.Conn
	stop chan struct{} // closed by the test

	sent               int // by typeOn; the next ones by listen
	answered           map[int]bool
	repeats, greetings int
}

const lastLine = "that was all"

// typeOn sends until stop, and then the last line.
func (p *typist) typeOn(ctx context.Context, t *testing.T) {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		line := lastLine
		select {
		case <-tick.C:
			line = strconv.Itoa(p.sent + 1)
		case <-p.stop:
		}
		if err := p.conn.Write(ctx, websocket.MessageText, []byte(line)); err != nil {
			t.Errorf("sending line %d: %v", p.sent+1, err)
			return
		}
		if line == lastLine {
			return
		}
		p.sent++
	}
}

// listen reads until the answer to the last line: answers come in order.
func (p *typist) listen(ctx context.Context, t *testing.T) {
	for {
		var message struct{ Text *string }
		_, payload, err := p.conn.Read(ctx)
		if err == nil {
			err = json.Unmarshal(payload, &message)
		}
		if err != nil {
			t.Errorf("hearing answers: %v", err)
			return
		}
		if message.Text == nil {
			p.greetings++
			continue
		}
		if *message.Text == lastLine {
			return
		}
		n, err := strconv.Atoi(*message.Text)
		if err != nil {
			t.Errorf("got an answer to %q, which is no line", *message.Text)
		}
		if p.answered[n] {
			p.repeats++
		}
		p.answered[n] = true
	}
}
