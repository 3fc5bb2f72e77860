package api

import (
	"net/http"

	"github.com/bivouac/bivouac/internal/api/wire"
)

func (a *API) why(w http.ResponseWriter, r *http.Request, _ query) error {
	chat, err := chatID(r)
	if err != nil {
		return err
	}
	stories, err := a.config.Sessions.Why(r.Context(), chat)
	if err != nil {
		return err
	}
	body := wire.WhyAnswer{ChatID: chat, Sessions: make([]wire.Story, len(stories))}
	for i, story := range stories {
		told := wire.Story{
			SessionID: story.SessionID, AgentID: story.AgentID, Runtime: story.Runtime,
			State: string(story.State), Outcome: story.Outcome, Events: make([]wire.StoryEvent, len(story.Events)),
		}
		if story.State == "" {
			told.State = wire.StateGone
		}
		for j, one := range story.Events {
			told.Events[j] = wire.StoryEvent{Source: one.Source, Text: one.Text}
			if !one.Time.IsZero() {
				told.Events[j].Time = new(one.Time.UTC())
			}
		}
		body.Sessions[i] = told
	}
	return writeJSON(w, http.StatusOK, body)
}
