package main

import (
	"context"
	"io"
	"maps"
	"net/http"
	"testing"
	"time"

	"github.com/coder/websocket"
)

func TestRestartBringsTheBackendBack(t *testing.T) {
	f, c := startedFront(t)
	for _, test := range []struct {
		how  string
		code websocket.StatusCode // -1: none
	}{
		{"kill", -1},
		{"stop", websocket.StatusGoingAway},
	} {
		conn := dial(t, c.address(), nil)
		receive[hello](t, conn)
		addr, pid, asked := c.address(), c.pid(), time.Now()
		if got, want := restart(t, f, "alder?how="+test.how, nil), http.StatusNoContent; got != want {
			t.Fatalf("%s: got status %d, want %d", test.how, got, want)
		}
		if away := time.Since(asked); away < downtime {
			t.Errorf("%s: back after %s, want %s at least", test.how, away, downtime)
		}
		_, _, err := conn.Read(t.Context())
		if got, want := websocket.CloseStatus(err), test.code; got != want {
			t.Errorf("%s: got close code %d (%v), want %d", test.how, got, err, want)
		}
		if c.pid() == pid || c.address() != addr {
			t.Errorf("%s: got process %d on %s, want another one than %d on %s", test.how, c.pid(), c.address(), pid, addr)
		}
		receive[hello](t, dial(t, c.address(), nil))
	}
}

func TestRestartIsForThePageOnly(t *testing.T) {
	f, c := startedFront(t)
	pid := c.pid()
	own := "http://" + f.address()
	for _, test := range []struct {
		name, method, path string
		header             http.Header
		status             int
	}{
		{"unknown backend", http.MethodPost, "oak?how=kill", nil, http.StatusNotFound},
		{"neither way", http.MethodPost, "alder", nil, http.StatusBadRequest},
		{"unknown way", http.MethodPost, "alder?how=drown", nil, http.StatusBadRequest},
		{"GET", http.MethodGet, "alder?how=kill", nil, http.StatusMethodNotAllowed},
		{"foreign origin", http.MethodPost, "alder?how=kill", http.Header{"Origin": {"http://example.com"}}, http.StatusForbidden},
		{"opaque origin", http.MethodPost, "alder?how=kill", http.Header{"Origin": {"null"}}, http.StatusForbidden},
		{"other port", http.MethodPost, "alder?how=kill", http.Header{"Origin": {"http://127.0.0.1:1"}}, http.StatusForbidden},
		{"cross-site", http.MethodPost, "alder?how=kill", http.Header{"Origin": {own}, "Sec-Fetch-Site": {"cross-site"}}, http.StatusForbidden},
		{"same-site", http.MethodPost, "alder?how=kill", http.Header{"Origin": {own}, "Sec-Fetch-Site": {"same-site"}}, http.StatusForbidden},
		{"the page, neither way", http.MethodPost, "alder", http.Header{"Origin": {own}, "Sec-Fetch-Site": {"same-origin"}}, http.StatusBadRequest},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got, want := request(t, f, test.method, test.path, test.header), test.status; got != want {
				t.Errorf("got status %d, want %d", got, want)
			}
		})
	}
	if c.pid() != pid || c.current().ended() {
		t.Error("the backend was restarted")
	}
}

func TestOneRestartAtATime(t *testing.T) {
	f, c := startedFront(t)
	first, pid := make(chan int, 1), c.pid()
	go restartInto(t, first, f)
	awaitEnd(t, c)
	if got, want := restart(t, f, "alder?how=kill", nil), http.StatusConflict; got != want {
		t.Errorf("got status %d for the second, want %d", got, want)
	}
	if got, want := <-first, http.StatusNoContent; got != want {
		t.Errorf("got status %d for the first, want %d", got, want)
	}
	if c.pid() == pid || c.current().ended() {
		t.Error("the backend is not back")
	}
}

func TestStoppedFrontRestartsNothing(t *testing.T) {
	f, c := startedFront(t)
	under := make(chan int, 1)
	go restartInto(t, under, f)
	awaitEnd(t, c)
	f.stop()
	if got, want := <-under, http.StatusServiceUnavailable; got != want {
		t.Errorf("got status %d, want %d", got, want)
	}
	if status, err := f.restart(c, c.kill); err == nil || status != http.StatusServiceUnavailable {
		t.Errorf("got status %d, error %v after stop; want %d", status, err, http.StatusServiceUnavailable)
	}
	if !c.current().ended() {
		t.Error("the backend is back")
	}
}

func startedFront(t *testing.T) (*front, *child) {
	t.Helper()
	c := startedChild(t, "alder")
	f, err := startFront(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.stop)
	return f, c
}

// restartInto sends the one status of a restart and ends.
func restartInto(t *testing.T, status chan<- int, f *front) {
	status <- restart(t, f, "alder?how=kill", nil)
}

func restart(t *testing.T, f *front, path string, header http.Header) int {
	t.Helper()
	return request(t, f, http.MethodPost, path, header)
}

// request returns the answer's status, 0 if there is none.
func request(t *testing.T, f *front, method, path string, header http.Header) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, "http://"+f.address()+"/restart/"+path, nil)
	if err != nil {
		t.Error(err)
		return 0
	}
	maps.Copy(r.Header, header)
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Error(err)
		return 0
	}
	defer response.Body.Close()
	_, _ = io.Copy(io.Discard, response.Body)
	return response.StatusCode
}
